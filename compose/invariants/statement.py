"""One statement about a composite, and what all of them are checked with.

B batch, S sequence, V vocabulary.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moiety.compose.builder import Builder
from moiety.compose.opening import open_any
from moiety.errors import InvariantError

ALLOWED = 1e-3
"""Largest difference of logits, over their own largest size, that rounding in fp32 explains."""
TOKENS = 32
NEW_TOKENS = 8


@dataclass(frozen=True)
class Invariant:
    """One statement about a composite: `difference` is relative to the largest logit."""

    statement: str
    difference: float
    allowed: float = ALLOWED

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.difference <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return {**asdict(self), "holds": self.holds}


def text_of(builder: Builder) -> Tensor:
    """The first tokens of each domain's calibration text (B, S); any tokens if it has none."""
    if not all(expert.domain.has_text for expert in builder.recipe.experts):
        words = builder.base.config.get_text_config().vocab_size
        return torch.arange(TOKENS).remainder(words)[None]
    rows = [windows.ids_WC[0] for windows in builder.calibration.values()]
    lengths = [int(windows.mask_WC[0].sum()) for windows in builder.calibration.values()]
    return torch.stack([row[: min(TOKENS, *lengths)] for row in rows])


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """A model's logits (B, S, V) in fp32."""
    return model(input_ids=ids_BS).logits.float()


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, over the second's own largest size."""
    return float((one - other).abs().max() / other.abs().max())


def stock_model(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A dense model of a stock architecture with these weights, in fp32."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    absent = set(missing) - set(getattr(model, "all_tied_weights_keys", None) or {})
    if absent or unexpected:
        raise InvariantError(
            f"expected each expert to have every tensor, but {[*absent, *unexpected][0]} is "
            "missing or has no place"
        )
    return model


def saved_again(folder: Path, ids_BS: Tensor) -> Invariant:
    """Saved and opened again, the composite generates the same tokens and gives equal logits."""
    model = open_any(folder).model
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saved.") as scratch:
        model.save_pretrained(scratch)
        again = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto").eval()
    statement = "saved and opened again it gives the same logits and generates the same tokens"
    return _same(statement, model, again, ids_BS)


def opened_again(folder: Path, ids_BS: Tensor) -> Invariant:
    """Opened twice, a task vector generates the same tokens and gives equal logits."""
    statement = "opened again on its base it gives the same logits and generates the same tokens"
    return _same(statement, open_any(folder).model, open_any(folder).model, ids_BS)


def _same(
    statement: str, model: PreTrainedModel, again: PreTrainedModel, ids_BS: Tensor
) -> Invariant:
    difference = apart(logits_of(again, ids_BS), logits_of(model, ids_BS))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    mask_BS = torch.ones_like(ids_BS)
    both: list[Any] = [model, again]
    written = [one.generate(ids_BS, attention_mask=mask_BS, **settings) for one in both]
    same = torch.equal(written[0], written[1])
    return Invariant(statement, difference if same else float("inf"), 0.0)
