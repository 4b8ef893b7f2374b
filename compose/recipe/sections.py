"""The sections of a recipe that every kind of composite has."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moiety.experts.methods.refit import STEPS
from moiety.experts.pattern import Pattern
from moiety.experts.sites import check_sites
from moiety.routers import FitSettings, TrainSettings


class Part(BaseModel):
    """A frozen section of a recipe that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Domain(Part):
    """A domain's text: `calibration` steers pruning and routing, `heldout` is only measured on."""

    calibration: str
    heldout: str | None = None


class Expert(Part):
    """One finetune: its name, its model (folder, hub id or PEFT adapter) and its domain's text."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.-]*$")
    model: str
    domain: Domain

    @field_validator("domain", mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"calibration": value} if isinstance(value, str) else value


class Prune(Part):
    """How each finetune is pruned; see moiety.experts.PruneSettings.

    `pattern` is `2:4`, any other N:M, or the share of weights kept, such as 0.5. `sites` are by
    default what the kind of composite holds of each expert. `recover` trains the kept values
    block by block afterwards.
    """

    pattern: str = "2:4"
    sites: str | None = None
    method: Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"] = "sparsegpt"
    refit_steps: int = Field(default=STEPS, ge=0)
    recover: bool = False
    values: Literal["bf16", "fp16", "fp32", "int8", "int4"] = "bf16"

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, float) else value
        if isinstance(text, str):
            Pattern.parse(text)
        return text

    @field_validator("sites")
    @classmethod
    def _sites(cls, value: str | None) -> str | None:
        if value is not None:
            check_sites(value)
        return value


class Route(Part):
    """How the gates are learned: a closed-form start, then `train_steps` of gate-only training."""

    init: Literal["ridge", "centroid", "random"] = "ridge"
    penalty: float = Field(default=FitSettings().penalty, gt=0)
    train_steps: int = Field(default=100, ge=0)
    learning_rate: float = Field(default=TrainSettings().learning_rate, gt=0)
    domain_weight: float = Field(default=TrainSettings().domain_weight, ge=0)
    balance_weight: float = Field(default=TrainSettings().balance_weight, ge=0)
    z_weight: float = Field(default=TrainSettings().z_weight, ge=0)


class Evaluate(Part):
    """What is measured: `windows` of held-out text a domain, and sets of exact-match problems.

    `problems` names JSONL files of `{"prompt", "answer"}` rows; a set that bears an expert's
    name is also asked of that finetune and that sparse expert.
    """

    windows: int = Field(default=64, ge=1)
    problems: dict[str, str] = {}
