"""Language-modelling loss of a model on windows of text."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moiety.text import Windows

IGNORED = -100
PIECE = 1 << 20
"""Logits looked at at once on a CPU."""


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
    if logits_WCV.requires_grad or logits_WCV.device.type != "cpu":
        nats_WC = _nats(logits_WCV[:, :-1].flatten(0, 1), target_WC.flatten()).view_as(target_WC)
    else:
        nats_WC = _nats_in_pieces(logits_WCV, target_WC)
    return functional.pad(nats_WC, (1, 0))


def _nats(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits_NV.float(), target_N, reduction="none", ignore_index=IGNORED
    )


def _nats_in_pieces(logits_WCV: Tensor, target_WC: Tensor) -> Tensor:
    """The same, bit for bit, of pieces that stay in a CPU's caches."""
    nats_WC = torch.zeros(target_WC.shape, dtype=torch.float32)
    size = max(1, PIECE // logits_WCV.shape[-1])
    for logits_CV, target_C, nats_C in zip(logits_WCV, target_WC, nats_WC, strict=True):
        for start in range(0, len(target_C), size):
            end = min(start + size, len(target_C))
            nats_C[start:end] = _nats(logits_CV[start:end], target_C[start:end])
    return nats_WC


@torch.no_grad()
def score(model: nn.Module, windows: Windows, batch_size: int = 8) -> Score:
    """Run the model over all windows, where it is, and add up the loss."""
    nats, device = 0.0, getattr(model, "device", torch.device("cpu"))
    if device.type == "meta":
        device = torch.device("cpu")
    for part in windows.batches(batch_size):
        ids_WC, mask_WC = part.ids_WC.to(device), part.mask_WC.to(device)
        logits_WCV = model(input_ids=ids_WC, attention_mask=mask_WC, use_cache=False).logits
        losses_WC = token_losses(logits_WCV, part.ids_WC, part.mask_WC)
        nats += float(losses_WC.sum(dtype=torch.float64))
    tokens = int(windows.mask_WC[:, 1:].sum())
    return Score(nats, tokens, int(windows.bytes_W.sum()))
