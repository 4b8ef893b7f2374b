"""The sections of a recipe that every kind of composite has."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moiety.errors import InputError
from moiety.experts.device import CPU, parse_device
from moiety.experts.methods.refit import STEPS
from moiety.experts.pattern import Pattern
from moiety.experts.sites import check_sites
from moiety.routers import FitSettings, TrainSettings
from moiety.text import read_documents


class Part(BaseModel):
    """A frozen section of a recipe that refuses fields it does not know.

    The line below a field says what it is for; `moiety recipe init` writes it as a comment.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Domain(Part):
    """A domain's text: `calibration` steers pruning and routing, `heldout` is only measured on.

    `prompts` are documents written into the recipe itself, in the place of `calibration`.
    """

    calibration: str | None = None
    """text that prunes, composes and routes: a file, a folder or datasets:OWNER/NAME"""
    heldout: str | None = None
    """text that is only measured on, needed for the controls"""
    prompts: tuple[str, ...] = ()
    """documents written here, in the place of calibration"""

    @model_validator(mode="after")
    def _one_source(self) -> "Domain":
        if self.calibration is not None and self.prompts:
            raise ValueError("expected calibration or prompts, but both are given; leave one out")
        return self

    @property
    def has_text(self) -> bool:
        """Whether any calibration text is named."""
        return self.calibration is not None or bool(self.prompts)

    def documents(self) -> Sequence[str]:
        """The calibration documents; InputError when none are named or they cannot be read."""
        if self.calibration is not None:
            return read_documents(self.calibration)
        found = [text for text in self.prompts if text.strip()]
        if not found:
            raise InputError(
                "expected calibration text, but none is named; give domain.calibration in the "
                "recipe, or --data NAME=FILE"
            )
        return found


class Prune(Part):
    """How each finetune is pruned; see moiety.experts.PruneSettings.

    `pattern` is `2:4`, any other N:M, or the share of weights kept, such as 0.5. `sites` are by
    default what the kind of composite holds of each expert. `recover` trains the kept values
    block by block afterwards.
    """

    pattern: str = "2:4"
    """2:4, any other N:M, or the share of weights kept, such as 0.5"""
    sites: str | None = None
    """null: what the kind holds of each expert; or ffn, attention, all, globs over module names"""
    method: Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"] = "sparsegpt"
    """how the weights that stay are chosen"""
    refit_steps: int = Field(default=STEPS, ge=0)
    """conjugate-gradient steps that then move the kept values; 0 for none"""
    recover: bool = False
    """whether the kept values are then trained block by block (slower, better)"""
    values: Literal["bf16", "fp16", "fp32", "int8", "int4"] = "bf16"
    """how the kept values are stored"""
    device: str = CPU
    """where it is done: cpu, cuda or cuda:1"""

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        parse_device(value)
        return value

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


class Expert(Part):
    """One finetune: its name, its model (folder, hub id or PEFT adapter) and its domain's text."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.-]*$")
    """names the expert, its domain and its row in every table"""
    model: str
    """a folder, a hub id or a PEFT adapter"""
    domain: Domain = Domain()
    """text of its domain; the path alone is short for calibration"""
    prune: Prune | None = None
    """null: as the recipe says; or how this one is pruned, the rest of it at its defaults"""

    @field_validator("domain", mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"calibration": value} if isinstance(value, str) else value


class Route(Part):
    """How the gates are learned: a closed-form start, then `train_steps` of gate-only training."""

    init: Literal["ridge", "logistic", "centroid", "arrow", "prompts", "random", "zeros"] = (
        "logistic"
    )
    """logistic, ridge, centroid; arrow (no text); controls prompts, random, zeros (no preference)"""
    penalty: float = Field(default=FitSettings().penalty, gt=0)
    """strength of ridge's and logistic's penalty"""
    stitch: float = Field(default=FitSettings().stitch, ge=0)
    """windows that switch domain inside, made for each of a domain's own; 0 for none"""
    train_steps: int = Field(default=100, ge=0)
    """steps of training, gates only; 0 for none"""
    objective: Literal["language", "distill", "domain", "regret"] = "language"
    """what is trained on: next-token loss, the own expert's distribution, labels, or regret"""
    learning_rate: float = Field(default=TrainSettings().learning_rate, gt=0)
    """of that training"""
    domain_weight: float = Field(default=TrainSettings().domain_weight, ge=0)
    """weight of the loss that draws tokens to their own domain's expert"""
    balance: Literal["loss", "bias", "none"] = TrainSettings().balance
    """how experts are kept in use: a loss, a selection bias (kind: sigmoid), or not at all"""
    balance_weight: float = Field(default=TrainSettings().balance_weight, ge=0)
    """weight of that loss"""
    z_weight: float = Field(default=TrainSettings().z_weight, ge=0)
    """weight of the loss that keeps the gates' logits small"""


class Evaluate(Part):
    """What is measured: `windows` of held-out text a domain, and sets of exact-match problems.

    `problems` names JSONL files of `{"prompt", "answer"}` rows; a set that bears an expert's
    name is also asked of that finetune and that sparse expert.
    """

    windows: int = Field(default=64, ge=1)
    """windows of held-out text a domain"""
    problems: dict[str, str] = {}
    """exact-match problems by name: JSONL files of {"prompt", "answer"} rows"""
