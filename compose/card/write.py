"""Write a composite's model card: metadata for the hub, then what it is, measured and needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from moiety.compose.card.licences import Licence, hub_id, licence_of, shared_licence
from moiety.compose.card.markdown import ABSENT, fenced, plain, section, table
from moiety.compose.card.sizes import Sizes, sizes_of
from moiety.compose.recipe import Merge, Recipe
from moiety.compose.report import BuildReport
from moiety.files import read_json, write_text
from moiety.version import __version__

README = "README.md"
MEASURES = {"loss": "Loss, nats per token", "bits_per_byte": "Bits per byte"}
WHAT = {
    "mixture": "a mixture of sparse FFN experts; a router picks the experts of every token",
    "routed": "one model whose linear layers are routed to sparse experts token by token",
    "merge": "one static merge of the finetunes",
    "ensemble": "the sparse experts side by side, their predictions weighed by the text so far",
}
LIMITS = """\
- What it can do comes from the finetunes; nothing here was tested for safety or bias.
- Losses hold for text like the held-out text they were measured on, at that context length.
- Without moiety's compiled kernels the packed matrices are expanded when used: half the bytes,
  but slower than dense. {elsewhere}
"""
WHOLE = "Engines other than transformers need `moiety export DIR --out NEW --dense`."
ELSEWHERE = {
    "mixture": WHOLE,
    "merge": WHOLE,
    "routed": """Other engines have no place for it: `moiety export DIR --out NEW --expert NAME`
  writes one of its experts as a stock dense model.""",
    "ensemble": "Other engines have no place for it.",
}


def write_card(
    folder: Path,
    recipe: Recipe,
    report: BuildReport,
    results: Mapping[str, Any] | None = None,
    invariants: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write README.md into a composite's folder, in the place of an earlier one.

    `results` are those of `moiety.analysis.controls.evaluate_build`; `invariants` have
    `statement`, `difference`, `allowed` and `holds`. Of paths only the last part is shown.
    """
    models = {"base": recipe.base, **{expert.name: expert.model for expert in recipe.experts}}
    licences = {name: licence_of(model) for name, model in models.items()}
    agreed = shared_licence(licences)
    fields = read_json(folder / "config.json")
    parts = [
        f"---\n{_metadata(recipe, models, agreed).to_yaml()}\n---",
        _summary(recipe, models),
        section("Loading", *_loading(fields)),
        section("Bytes", *_bytes(sizes_of(folder, recipe), fields)),
        section("Measured", *_measured(results)),
        *([section("Invariants", _invariants(invariants))] if invariants else []),
        section("Licence", *_licence(licences, agreed)),
        section("Recipe", fenced(_recipe(recipe), "yaml"), _facts(report)),
        section("Limits", LIMITS.format(elsewhere=ELSEWHERE[recipe.compose.kind]).rstrip()),
    ]
    write_text(folder / README, "\n\n".join(parts) + "\n")


def _metadata(recipe: Recipe, models: Mapping[str, str], licence: Licence | None) -> ModelCardData:
    ids = [found for model in dict.fromkeys(models.values()) if (found := hub_id(model))]
    routed = recipe.compose.kind in ("mixture", "routed")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=ids or None,
        base_model_relation="merge" if ids else None,
        license=licence.id if licence else None,
        license_name=licence.name if licence else None,
        tags=["moiety", "merge", "sparse", *(["moe"] if routed else [])],
    )


def _summary(recipe: Recipe, models: Mapping[str, str]) -> str:
    experts = ", ".join(plain(name) for name in recipe.names)
    title = f"# {experts}: {recipe.compose.kind} of {len(recipe.experts)} finetunes"
    rows = [(name, hub_id(model) or Path(model).name) for name, model in models.items()]
    made = f"Made with moiety {__version__}: {WHAT[recipe.compose.kind]}. {_sparsity(recipe)}"
    return "\n\n".join([title, made, table(("part", "model"), rows)])


def _sparsity(recipe: Recipe) -> str:
    if isinstance(recipe.compose, Merge) and recipe.compose.sparse == "none":
        return "Nothing was pruned."
    patterns, values = plain(", ".join(recipe.patterns)), plain(recipe.prune.values)
    return f"What was pruned has the pattern {patterns}, kept values in {values}."


def _loading(fields: Mapping[str, Any]) -> list[str]:
    opened = 'AutoModelForCausalLM.from_pretrained("PATH_OR_ID")'
    imports = "from transformers import AutoModelForCausalLM"
    if _base_of(fields):
        code = 'from moiety.experts import open_delta\n\nmodel = open_delta("FOLDER", "BASE")'
        return [
            "It holds differences to its base, which must be there too:",
            fenced(code, "python"),
        ]
    if "quantization_config" not in fields and "auto_map" not in fields:
        return ["A stock checkpoint:", fenced(f"{imports}\n\nmodel = {opened}", "python")]
    code = f"import moiety\n{imports}\n\nmodel = {opened}"
    if "auto_map" not in fields:
        return ["After `pip install moiety`:", fenced(code, "python")]
    code += f"\n\n# or, where moiety is installed but not imported:\nmodel = {opened[:-1]}"
    return ["After `pip install moiety`:", fenced(f"{code}, trust_remote_code=True)", "python")]


def _bytes(sizes: Sizes, fields: Mapping[str, Any]) -> list[str]:
    rows = [
        ("all weights", f"{sizes.total:,}"),
        ("active for one token", f"{sizes.active:,}"),
        ("all weights, were they dense", f"{sizes.dense:,}"),
    ]
    note = "The base, which is needed beside them, is not counted." if _base_of(fields) else ""
    return [table(("", "bytes"), rows), note]


def _base_of(fields: Mapping[str, Any]) -> str | None:
    return (fields.get("moiety") or {}).get("task_vector_of")


def _measured(results: Mapping[str, Any] | None) -> list[str]:
    if not results:
        return ["Not measured: no held-out text was given."]
    domains = [str(domain) for domain in results.get("domains", ())]
    note = (
        f"On held-out text, context length {plain(results.get('context_length'))} tokens, seed "
        f"{plain(results.get('seed'))}. A dash: not measured on that domain."
    )
    tables = []
    for measure, title in MEASURES.items():
        values = results.get(measure) or {}
        rows = [
            (row.replace("_", " "), *(_number(scores.get(domain)) for domain in domains))
            for row, scores in values.items()
        ]
        tables += [f"{title}:", table((title, *map(plain, domains)), rows)]
    return [note, *tables, _accuracy(results), _speed(results)]


def _accuracy(results: Mapping[str, Any]) -> str:
    """Shares of exact-match problems solved, a column for each set of them."""
    sets: Mapping[str, Any] = results.get("accuracy") or {}
    named = list(dict.fromkeys(row for scores in sets.values() for row in scores))
    if not named:
        return ""
    rows = [
        (row.replace("_", " "), *(_number(scores.get(row)) for scores in sets.values()))
        for row in named
    ]
    return f"Problems solved exactly:\n\n{table(('share', *map(plain, sets)), rows)}"


def _speed(results: Mapping[str, Any]) -> str:
    rows = [
        (row.replace("_", " "), _number(speed.get("prefill"), 0), _number(speed.get("decode"), 1))
        for row, speed in (results.get("tokens_per_second") or {}).items()
    ]
    if not rows:
        return ""
    note = f"Measured on {plain(results.get('device', 'an unnamed device'))}, one sequence."
    return f"{table(('', 'prefill, tokens/s', 'decode, tokens/s'), rows)}\n\n{note}"


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ABSENT


def _invariants(invariants: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (one["statement"], f"{one['difference']:.2g}", f"{one['allowed']:g}", _yes(one["holds"]))
        for one in invariants
    ]
    return table(("statement", "largest difference", "allowed", "holds"), rows)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _licence(licences: Mapping[str, Licence | None], agreed: Licence | None) -> list[str]:
    if agreed is not None:
        return [f"All of its inputs state {plain(agreed)}."]
    stated = {licence for licence in licences.values() if licence is not None}
    told = "state different licences" if len(stated) > 1 else "do not all state a licence"
    rows = [(name, licence or "none stated") for name, licence in licences.items()]
    advice = "No licence is given here for that reason; what may be done with it is yours to find."
    return [f"**Its inputs {told}.** {advice}", table(("part", "licence"), rows)]


def _recipe(recipe: Recipe) -> str:
    values = _without_folders(recipe.model_dump(mode="json", exclude_none=True))
    return yaml.safe_dump(values, sort_keys=False, width=100, allow_unicode=False)


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _facts(report: BuildReport) -> str:
    facts = {name: _without_folders(value) for name, value in report.facts.items()}
    rows = [
        (name.replace("_", " "), value)
        for name, value in facts.items()
        if isinstance(value, str | int | float)
    ]
    return table(("chosen or learned", ""), rows) if rows else ""
