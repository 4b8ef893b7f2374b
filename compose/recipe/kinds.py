"""The section `compose`: the four kinds of composite."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from mergekit.merge_methods import registered_methods
from pydantic import BeforeValidator, Field, field_validator

from moiety.compose.recipe.sections import Part

Weight = float | dict[str, float]
"""A parameter of a merge: one number for all experts, or one an expert by name."""
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
    shared_weight: float = Field(default=0.25, gt=0, le=2)

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
    top_k: int = Field(default=2, ge=1)
    layers: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"


class Routed(WithShared):
    """Every pruned linear is routed, in our own thin model class.

    With `base: dense` a linear is the base's plus `top_k` routed sparse deltas, with `base: none`
    a mixture of whole sparse ones. `routers` is one a `layer`, or `split`: one for its attention
    and one for its FFN. `norms`, `embeddings` and the untied `head` are the shared part's, or
    routed too.
    """

    kind: Literal["routed"] = "routed"
    base: Literal["dense", "none"] = "dense"
    top_k: int = Field(default=1, ge=1)
    routers: Literal["layer", "split"] = "layer"
    norms: Literal["shared", "routed"] = "shared"
    embeddings: Literal["shared", "routed"] = "shared"
    head: Literal["shared", "routed"] = "shared"


class Merge(Part):
    """One static model by any of mergekit's methods, kept sparse.

    `sparse`: `shared_mask` (one mask for all finetunes, so that a weighted sum keeps it),
    `reprune` (the dense merge is pruned on all domains' text), `conflict_aware` (the base stays
    dense, the merged task vector has the pattern, each place is one finetune's), or `none`.
    """

    kind: Literal["merge"] = "merge"
    method: str = "task_arithmetic"
    parameters: dict[str, Weight | bool] = Field(default={})
    sparse: Literal["shared_mask", "reprune", "conflict_aware", "none"] = "reprune"

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known_method(value)


class Ensemble(Part):
    """All sparse experts side by side, their next-token distributions mixed.

    The weights are the posterior over experts given the sequence so far, starting from `prior`
    (by expert's name; equal if absent).
    """

    kind: Literal["ensemble"] = "ensemble"
    prior: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})


KINDS: dict[str, type[Part]] = {
    "mixture": Mixture,
    "routed": Routed,
    "merge": Merge,
    "ensemble": Ensemble,
}


def _with_kind(value: Any) -> Any:
    return {"kind": "mixture", **value} if isinstance(value, dict) else value


Compose = Annotated[
    Annotated[Mixture | Routed | Merge | Ensemble, Field(discriminator="kind")],
    BeforeValidator(_with_kind),
]
