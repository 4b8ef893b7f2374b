"""Language-modelling loss of a model on windows of text."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moiety.text import Windows

IGNORED = -100


@dataclass(frozen=True)
class Score:
    """Total negative log-likelihood (nats) over a number of predicted tokens and their bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the predicted text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def token_losses(logits_WCV: Tensor, ids_WC: Tensor, mask_WC: Tensor) -> Tensor:
    """Nats of each token given those before it, (W, C) in fp32; 0 for first tokens and padding."""
    ids_WC, mask_WC = ids_WC.to(logits_WCV.device), mask_WC.to(logits_WCV.device)
    target_WC = ids_WC.masked_fill(mask_WC == 0, IGNORED)[:, 1:]
    nats = functional.cross_entropy(
        logits_WCV[:, :-1].flatten(0, 1).float(),
        target_WC.flatten(),
        reduction="none",
        ignore_index=IGNORED,
    )
    return functional.pad(nats.view_as(target_WC), (1, 0))


@torch.no_grad()
def score(model: nn.Module, windows: Windows, batch_size: int = 8) -> Score:
    """Run the model over all windows and add up the loss."""
    nats = 0.0
    for part in windows.batches(batch_size):
        logits_WCV = model(
            input_ids=part.ids_WC, attention_mask=part.mask_WC, use_cache=False
        ).logits
        losses_WC = token_losses(logits_WCV, part.ids_WC, part.mask_WC)
        nats += float(losses_WC.sum(dtype=torch.float64))
    tokens = int(windows.mask_WC[:, 1:].sum())
    return Score(nats, tokens, int(windows.bytes_W.sum()))
