"""LoRA whose merge keeps the mask: a PEFT layer that trains what will be merged.

A plain LoRA layer puts out W x + s B A x. Merged and masked again the weight would be
W + (s B A) ⊙ M, a different function: about half of the update of a 2:4 matrix is dropped, and
nothing in training has seen that. Here the forward pass itself uses the masked product.
O out features, I in features.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn import functional

from moiety.experts.recovery.kept import rounded


class MaskedLoraLinear(Linear):
    """A PEFT LoRA layer that computes with W + (B A · scaling) ⊙ M, rounded to what is stored."""

    mask_OI: Tensor
    stored: torch.dtype

    def fix_mask(self, mask_OI: Tensor, stored: torch.dtype) -> None:
        """Say which weights may change, and the dtype that the merged weight is saved in."""
        self.register_buffer("mask_OI", mask_OI, persistent=False)
        self.stored = stored

    def merged_weight(self) -> Tensor:
        """The weight (O, I) that the adapter will leave behind; zero where the mask is."""
        weight_OI = cast(Tensor, self.get_base_layer().weight)
        for adapter in self.active_adapters:
            weight_OI = weight_OI + self.get_delta_weight(adapter) * self.mask_OI
        return rounded(weight_OI, self.stored)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x @ merged_weightᵀ + bias`, (..., I) to (..., O)."""
        return functional.linear(x, self.merged_weight(), cast(Any, self.get_base_layer()).bias)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside the block PEFT may read a model attribute by a name that transformers has replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield
