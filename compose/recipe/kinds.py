"""The section `compose`: the four kinds of composite."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from mergekit.merge_methods import registered_methods
from pydantic import BeforeValidator, Field, field_validator, model_validator

from moiety.compose.recipe.sections import Part
from moiety.routers.spec import CHOOSING, Horizon, Kind, RouterSpec

Weight = float | dict[str, float]
"""A parameter of a merge: one number for all experts, or one an expert by name."""
HORIZONS: tuple[Horizon, ...] = (8, 32, 128)
SHARED_WORDS = ("auto", "base", "soup", "task_arithmetic")


def _known_method(name: str) -> str:
    methods = sorted(method.spec.name for method in registered_methods())
    if name not in methods:
        raise ValueError(f"expected one of mergekit's methods {', '.join(methods)}")
    return name


class Merging(Part):
    """One of mergekit's methods with its parameters, each for all experts or by expert's name."""

    method: str
    parameters: dict[str, Weight | bool] = Field(default={})

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known_method(value)


class WithShared(Part):
    """A kind with a shared part: everything that is not of one expert alone.

    `shared` says where that comes from: `base`, the `soup` (average) of the finetunes,
    `task_arithmetic` with `shared_weight` on every task vector, one expert by its name, any of
    mergekit's methods as `{method: ..., parameters: ...}`, or `auto`: whichever of base, soup and
    task arithmetic the calibration text prefers.
    """

    shared: str | Merging = "auto"
    """auto, base, soup, task_arithmetic, an expert's name, or {method: ..., parameters: ...}"""
    shared_weight: float = Field(default=0.25, gt=0, le=2)
    """weight on every task vector, for shared: task_arithmetic"""

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError unless `shared` is a known word or one of the experts' `names`."""
        if isinstance(self.shared, str) and self.shared not in (*SHARED_WORDS, *names):
            raise ValueError(
                f"compose.shared must be one of {', '.join(SHARED_WORDS)}, an expert's name "
                f"({', '.join(names)}) or {{method: ..., parameters: ...}}, but it is "
                f"{self.shared!r}"
            )


class Mixture(WithShared):
    """Sparse FFN experts in a stock transformers MoE that sends each token to `top_k` of them.

    `layers` are the ones with experts; the others' FFN belongs to the shared part.
    """

    kind: Literal["mixture"] = "mixture"
    """sparse FFN experts in a stock MoE; other kinds: routed, merge, ensemble"""
    top_k: int = Field(default=2, ge=1)
    """experts that a token is sent to"""
    layers: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"
    """all, or the numbers of the layers with experts, such as [4, 5, 6]"""


class RouterKind(Part):
    """What every router of a routed composite is; see moiety.routers.RouterSpec.

    `context` lets a gate see causal means of its input beside the token: over all tokens so far
    ("mean") or the last few. `span` layers in a row follow one router.
    """

    kind: Kind = "softmax"
    """softmax, sigmoid, sequence; or, with nothing to learn, constant, uniform, hash, random"""
    context: tuple[Horizon, ...] | None = None
    """horizons in tokens, or mean; [] for none; null: 8, 32 and 128 where the kind has any"""
    mass: float | None = Field(default=None, gt=0, le=1)
    """null, or the share of probability that is enough: no more experts than hold it"""
    score: Literal["linear", "absolute"] = "linear"
    """linear, or absolute: what route.init: arrow needs"""
    span: Literal["all"] | Annotated[int, Field(ge=1)] = 1
    """layers in a row that follow one router"""
    weights: dict[str, float] = Field(default={})
    """for kind: constant, the weight of every expert by name"""

    @property
    def horizons(self) -> tuple[Horizon, ...]:
        """The context, or the default one for kinds that have any."""
        if self.context is None:
            return HORIZONS if self.kind in CHOOSING else ()
        return self.context

    def spec(self, names: Sequence[str], top_k: int, seed: int) -> RouterSpec:
        """As the routers have it; ValueError unless the settings fit together."""
        weights = tuple(self.weights[name] for name in names) if self.weights else None
        return RouterSpec(
            kind=self.kind,
            top_k=top_k,
            mass=self.mass,
            context=self.horizons,
            score=self.score,
            weights=weights,
            seed=seed,
        )


class Routed(WithShared):
    """Every pruned linear is routed, in our own thin model class.

    With `base: dense` a linear is the base's plus `top_k` routed sparse deltas, with `base: none`
    a mixture of whole sparse ones. `routers` is one a `layer`, or `split`: one for its attention
    and one for its FFN. `norms`, `embeddings` and the untied `head` are the shared part's, or
    routed too.
    """

    kind: Literal["routed"] = "routed"
    """every pruned linear is routed; other kinds: mixture, merge, ensemble"""
    base: Literal["dense", "none"] = "dense"
    """dense: the base's weights plus sparse deltas; none: whole sparse weights"""
    top_k: int = Field(default=1, ge=1)
    """experts that a token is sent to"""
    routers: Literal["layer", "split"] = "layer"
    """one a layer, or one each for its attention and its FFN"""
    router: RouterKind = RouterKind()
    norms: Literal["shared", "routed"] = "shared"
    """from the shared part, or each expert's own"""
    embeddings: Literal["shared", "routed"] = "shared"
    """from the shared part, or each expert's own"""
    head: Literal["shared", "routed"] = "shared"
    """an untied head: from the shared part, or each expert's own"""

    @model_validator(mode="after")
    def _norms_need_layers(self) -> "Routed":
        if self.norms == "routed" and self.routers == "split":
            raise ValueError(
                "norms: routed needs routers: layer, because a norm stands before the module that "
                "split routers look at; leave one of them out"
            )
        if self.router.span != 1 and self.routers == "split":
            raise ValueError("router.span needs routers: layer; leave one of them out")
        return self

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError unless shared part and router fit the experts' `names`."""
        super().check(names)
        if self.router.weights and sorted(self.router.weights) != sorted(names):
            raise ValueError(
                f"compose.router.weights must name every expert ({', '.join(names)}), but they "
                f"name {', '.join(self.router.weights)}"
            )
        self.router.spec(names, self.top_k, 0)

    def spec(self, names: Sequence[str], seed: int) -> RouterSpec:
        """What every router is."""
        return self.router.spec(names, self.top_k, seed)

    def layers_of(self, layers: int) -> int:
        """For how many of a model's `layers` each router decides."""
        return layers if self.router.span == "all" else self.router.span


class Merge(Part):
    """One static model by any of mergekit's methods, kept sparse.

    `sparse`: `shared_mask` (one mask for all finetunes, so that a weighted sum keeps it),
    `reprune` (the dense merge is pruned on all domains' text), `conflict_aware` (the base stays
    dense, the merged task vector has the pattern, each place is one finetune's), or `none`.
    `weight: auto`, as task arithmetic has it if none is given, takes the weight that the
    calibration text prefers.
    """

    kind: Literal["merge"] = "merge"
    """one static sparse model; other kinds: mixture, routed, ensemble"""
    method: str = "task_arithmetic"
    """any of mergekit's methods, such as ties, dare_ties, sce, linear"""
    parameters: dict[str, Weight | bool | Literal["auto"]] = Field(default={})
    """the method's, each one value or one for each expert by name; weight: auto is chosen"""
    sparse: Literal["shared_mask", "reprune", "conflict_aware", "none"] = "reprune"
    """shared_mask, reprune, conflict_aware or none"""

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known_method(value)

    @field_validator("parameters")
    @classmethod
    def _auto(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, given in value.items():
            if given == "auto" and name != "weight":
                raise ValueError(f"only weight can be auto, but {name} is")
        return value

    @property
    def chooses_weight(self) -> bool:
        """Whether one weight for all finetunes is chosen on calibration text."""
        default = "auto" if self.method == "task_arithmetic" else None
        return self.parameters.get("weight", default) == "auto"

    def merging(self, weight: float | None = None) -> Merging:
        """The method and its parameters, with the `weight` that was chosen."""
        given = {n: v for n, v in self.parameters.items() if not isinstance(v, str)}
        chosen = {} if weight is None else {"weight": weight}
        return Merging(method=self.method, parameters={**given, **chosen})


class Ensemble(Part):
    """All sparse experts side by side, their next-token distributions mixed.

    The weights are the posterior over experts given the sequence so far, starting from `prior`
    (by expert's name; equal if absent).
    """

    kind: Literal["ensemble"] = "ensemble"
    """all sparse experts side by side; other kinds: mixture, routed, merge"""
    prior: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """weights before any text, by expert's name; {}: equal"""


KINDS: dict[str, type[Part]] = {
    "mixture": Mixture,
    "routed": Routed,
    "merge": Merge,
    "ensemble": Ensemble,
}


def _with_kind(value: Any) -> Any:
    """A kind's name alone stands for it with every setting at its default."""
    if isinstance(value, str):
        return {"kind": value}
    return {"kind": "mixture", **value} if isinstance(value, dict) else value


Compose = Annotated[
    Annotated[Mixture | Routed | Merge | Ensemble, Field(discriminator="kind")],
    BeforeValidator(_with_kind),
]
