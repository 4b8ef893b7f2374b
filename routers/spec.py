"""What a router of our own composites is: its kind, how many experts it takes, what it looks at."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moiety.errors import InputError

Kind = Literal["softmax", "sigmoid", "sequence", "constant", "uniform", "hash", "random"]
Horizon = Annotated[int, Field(ge=2)] | Literal["mean"]
LEARNED = ("softmax", "sigmoid", "sequence")
CHOOSING = ("softmax", "sigmoid")


class RouterSpec(BaseModel):
    """A kind of router and its settings; frozen, kept in the checkpoint's configuration.

    `softmax` takes the `top_k` most probable experts (all of them is a soft mixture), `sigmoid`
    scores each expert alone and chooses with a bias that balances load without a loss
    (arXiv:2408.15664), `sequence` has one posterior a sequence, updated with every token.
    `constant` gives the experts the fixed `weights` (task arithmetic), `uniform` the same to all;
    `hash` sends a token to the expert of its id (Roller et al. 2021, arXiv:2106.04426) and
    `random` to one drawn from `seed`, id and position.

    `mass`: no more experts than hold this share of the probability, at most `top_k`. `context`:
    the gate also sees causal means of its input, "mean" over all tokens so far, a number over
    about the last so many (an exponential mean). `score: absolute` takes |x·w| as Arrow does
    (arXiv:2405.11157).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "softmax"
    top_k: int = Field(default=1, ge=1)
    mass: float | None = Field(default=None, gt=0, le=1)
    context: tuple[Horizon, ...] = ()
    score: Literal["linear", "absolute"] = "linear"
    weights: tuple[float, ...] | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "RouterSpec":
        if len(set(self.context)) < len(self.context):
            raise ValueError(f"context must not name a horizon twice, but it is {self.context}")
        for name in ("context", "mass"):
            if getattr(self, name) and self.kind not in CHOOSING:
                raise ValueError(f"{name} is for kinds {', '.join(CHOOSING)}, not for {self.kind}")
        if (self.weights is not None) != (self.kind == "constant"):
            raise ValueError("weights are what kind: constant needs, and no other kind has")
        return self

    @property
    def learned(self) -> bool:
        """Whether there is a gate weight to learn."""
        return self.kind in LEARNED

    @property
    def horizons(self) -> tuple[Horizon, ...]:
        """The causal sums a router keeps: those of its context; the evidence of `sequence`."""
        return ("mean",) if self.kind == "sequence" else self.context

    def active(self, experts: int) -> int:
        """Experts of one token."""
        if self.kind in LEARNED:
            return self.top_k
        return experts if self.kind in ("constant", "uniform") else 1

    def plain(self) -> "RouterSpec":
        """The same without a memory of earlier tokens: for embeddings and heads."""
        kind = "softmax" if self.kind == "sequence" else self.kind
        return self.model_copy(update={"kind": kind, "context": ()})

    def check(self, experts: int) -> None:
        """Raise InputError unless it fits this number of experts."""
        if self.kind in LEARNED and self.top_k > experts:
            raise InputError(
                f"top_k must be at most the number of experts, {experts}, but it is {self.top_k}"
            )
        if self.weights is not None and len(self.weights) != experts:
            raise InputError(
                f"expected weights for {experts} experts, but there are {len(self.weights)}"
            )
