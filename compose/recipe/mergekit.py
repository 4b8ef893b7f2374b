"""Files of mergekit-yaml and mergekit-moe read as recipes, or refused line by line.

What a recipe cannot say exactly is refused with its name and line, never left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.merge_methods import BasePolicy, InputContract, registered_methods

from moiety.compose.recipe.reading import line_of
from moiety.errors import InputError

MERGE_FIELDS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
TOKENIZER_FIELDS = ("tokenizer_source", "tokenizer")
MOE_FIELDS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token")
WHY_NOT = {
    "slices": "layers of several models are not stacked here; where every slice is a whole model, "
    "list them under models instead",
    "modules": "a recipe merges whole language models; list them under models instead",
    "chat_template": "the base's is kept; write the one you want into its tokenizer and remove "
    "this line",
    "shared_experts": "a mixture has no expert that every token goes to; remove it, or use kind "
    "routed with base: dense",
    "negative_prompts": "a gate learns what is not an expert's from the other experts' text; "
    "remove it",
    "noise_scale": "experts are kept as they are; remove it",
    "residual_scale": "experts are kept as they are; remove it",
    "architecture": "the stock mixture is chosen by the base; remove this line",
}
DEFAULT_WHY = "it has no equal in a recipe; remove it"
GATES = {
    "hidden": {"init": "centroid", "train_steps": 0},
    "random": {"init": "random", "train_steps": 0},
}
WHY_NOT_GATE = {
    "cheap_embed": "gates see hidden states here, not token embeddings; write gate_mode: hidden",
    "uniform_random": "random gates are normal here; write gate_mode: random",
}
Location = tuple[str | int, ...]


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is a configuration of mergekit-yaml or mergekit-moe."""
    return "merge_method" in values or _is_moe(values)


def _is_moe(values: Mapping[str, Any]) -> bool:
    experts = values.get("experts")
    known = isinstance(experts, list) and any(
        isinstance(expert, dict) and "source_model" in expert for expert in experts
    )
    return known or "gate_mode" in values


def translate(path: Path, tree: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same as plain values of a recipe; InputError lists every line that has no equal.

    A merge becomes kind merge with `sparse: none`, which is mergekit's result; a MoE becomes
    kind mixture with everything but the experts from its base model, and its positive prompts
    are the experts' text.
    """
    translation = _Translation(tree, values)
    made = translation.moe() if _is_moe(values) else translation.merge()
    if translation.refused:
        listed = "; ".join(dict.fromkeys(translation.refused))
        raise InputError(f"{path} is a mergekit file that cannot be carried over: {listed}")
    return made


class _Translation:
    def __init__(self, tree: Any, values: Mapping[str, Any]) -> None:
        self.tree = tree
        self.values = values
        self.refused: list[str] = []

    def refuse(self, place: Location, why: str) -> None:
        """Note one line that a recipe cannot say."""
        field = ".".join(str(part) for part in place)
        self.refused.append(f"line {line_of(self.tree, place)}: {field}: {why}")

    def merge(self) -> dict[str, Any]:
        """A file of mergekit-yaml."""
        self.only((), self.values, (*MERGE_FIELDS, *TOKENIZER_FIELDS))
        base = self.model(("base_model",)) if "base_model" in self.values else None
        entries: list[str] = []
        inputs: dict[int, Mapping[str, Any]] = {}
        for number, entry in enumerate(self.rows("models")):
            place = ("models", number)
            self.only(place, entry, ("model", "parameters"))
            model = self.model((*place, "model"), base)
            base = base or model
            if model == self.values.get("base_model") and not self.from_first:
                if entry.get("parameters"):
                    self.refuse((*place, "parameters"), "those of the base have no place; remove")
                continue
            entries.append(model)
            inputs[number] = entry.get("parameters") or {}
        tokenizer = self.tokenizer(base)
        self.check_base()
        if self.from_first and entries[1:2] == [base]:
            entries, inputs = entries[::-1], dict(reversed(inputs.items()))
        names = expert_names(entries)
        return {
            "base": base or "",
            "experts": [
                {"name": name, "model": model} for name, model in zip(names, entries, strict=True)
            ],
            **self.dtype(),
            **tokenizer,
            "compose": {
                "kind": "merge",
                "method": self.values.get("merge_method"),
                "parameters": self.parameters(names, inputs),
                "sparse": "none",
            },
        }

    def moe(self) -> dict[str, Any]:
        """A file of mergekit-moe."""
        self.only((), self.values, MOE_FIELDS)
        base = self.model(("base_model",))
        models, prompts = [], []
        for number, entry in enumerate(self.rows("experts")):
            place = ("experts", number)
            self.only(place, entry, ("source_model", "positive_prompts"))
            models.append(self.model((*place, "source_model"), base))
            prompts.append(entry.get("positive_prompts") or [])
        mode = str(self.values.get("gate_mode", "hidden"))
        if mode not in GATES:
            self.refuse(("gate_mode",), WHY_NOT_GATE.get(mode, f"expected {' or '.join(GATES)}"))
        experts = [
            {"name": name, "model": model, "domain": {"prompts": given}}
            for name, model, given in zip(expert_names(models), models, prompts, strict=True)
        ]
        return {
            "base": base,
            "experts": experts,
            **self.dtype(),
            "compose": {
                "kind": "mixture",
                "top_k": self.values.get("experts_per_token", 2),
                "shared": "base",
            },
            "route": GATES.get(mode, {}),
        }

    def only(self, place: Location, values: Mapping[str, Any], known: Sequence[str]) -> None:
        """Refuse what a mapping says beyond the fields that are carried over."""
        for field in values:
            if field not in known:
                self.refuse((*place, field), WHY_NOT.get(str(field), DEFAULT_WHY))

    def rows(self, field: str) -> Iterator[Mapping[str, Any]]:
        """The mappings listed under a field."""
        found = self.values.get(field)
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            if field in self.values or "slices" not in self.values:
                self.refuse((field,), "expected a list of models")
            return
        yield from found

    def at(self, place: Location) -> Any:
        """The value at a place; None where there is none."""
        value: Any = self.values
        for part in place:
            value = value.get(part) if isinstance(value, dict) else value[int(part)]
        return value

    def model(self, place: Location, base: str | None = None) -> str:
        """A model's path; `BASE+LORA` gives the adapter where BASE is the base."""
        given = self.at(place)
        if not isinstance(given, str) or not given:
            self.refuse(place, "expected a path or a hub id")
            return "unknown"
        whole, _, adapter = given.partition("+")
        if "@" in given:
            self.refuse(place, "revisions are not read; download it and give the folder")
        if adapter and whole != base:
            self.refuse(place, "an adapter must be one of base_model; merge it into its own first")
        return adapter or whole

    def dtype(self) -> dict[str, Any]:
        """What mergekit would convert to, which the models must already be stored in."""
        given = {
            field: self.values[field] for field in ("dtype", "out_dtype") if field in self.values
        }
        if len(set(given.values())) > 1:
            self.refuse(("out_dtype",), "nothing is converted; give the same as dtype, or neither")
        return {"dtype": next(iter(given.values()))} if given else {}

    def tokenizer(self, base: str | None) -> dict[str, Any]:
        """The base's tokenizer or the union of all; any other is refused."""
        found: dict[str, Any] = {}
        for field in TOKENIZER_FIELDS:
            given = self.values.get(field)
            place: Location = (field,)
            if isinstance(given, dict):
                self.only((field,), given, ("source",))
                given, place = given.get("source", "union"), (field, "source")
            if given == "union":
                found = {"tokenizer": "union"}
            elif given not in (None, "base", base):
                self.refuse(place, "a model's own tokenizer is not taken; write base or union")
        return found

    @property
    def contract(self) -> InputContract | None:
        """How the method treats its inputs; None for an unknown one."""
        contracts = {method.spec.name: method.spec.contract for method in registered_methods()}
        return contracts.get(str(self.values.get("merge_method")))

    @property
    def from_first(self) -> bool:
        """Whether the method goes from one model, the base, to one other, as slerp does."""
        known = self.contract
        return known is not None and known.base is BasePolicy.REQUIRED and known.max_inputs == 2

    def check_base(self) -> None:
        """Refuse a base where a recipe's would count otherwise than mergekit's, or none."""
        policy, given = self.contract and self.contract.base, "base_model" in self.values
        if policy is BasePolicy.IGNORED and given:
            self.refuse(
                ("base_model",),
                "this method averages every model it is given, the base too; remove the line, and "
                "list the base under models where it is meant to count",
            )
        elif policy in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL) and not given:
            self.refuse(
                ("merge_method",), "a recipe's merge by this method starts at base_model; give one"
            )

    def parameters(
        self, names: Sequence[str], inputs: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Parameters for all experts, and those that an expert has of its own by its name."""
        common = self.values.get("parameters") or {}
        for field, value in common.items():
            self.check_plain(("parameters", field), value)
        found: dict[str, Any] = dict(common)
        for number, given in inputs.items():
            for field, value in given.items():
                self.check_plain(("models", number, "parameters", field), value)
        for field in dict.fromkeys(field for given in inputs.values() for field in given):
            each = dict(zip(names, inputs.items(), strict=True))
            own = {name: given.get(field, common.get(field)) for name, (_, given) in each.items()}
            for name, (number, _) in each.items():
                if own[name] is None:
                    self.refuse(("models", number), f"{field} is given for other models only")
            found[field] = own
        return found

    def check_plain(self, place: Location, value: Any) -> None:
        """Refuse gradients over layers and filters by tensor name."""
        if not isinstance(value, bool | int | float):
            self.refuse(place, "a parameter must be one number or true or false, for all layers")


def expert_names(models: Sequence[str]) -> list[str]:
    """Valid, unique names of experts, from the last parts of their models' paths."""
    names: list[str] = []
    for model in models:
        plain = re.sub(r"[^\w.-]+", "-", Path(model).name).lstrip("-.") or "expert"
        name, count = plain, 1
        while name in names:
            count += 1
            name = f"{plain}-{count}"
        names.append(name)
    return names
