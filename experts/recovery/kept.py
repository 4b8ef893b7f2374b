"""Train the kept values of masked weights and nothing else: what was removed has no parameter.

O out features, I in features, N kept values of a matrix, in row-major order.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moiety.errors import InputError


class _Place(torch.autograd.Function):
    """Kept values into a matrix; the gradient is read at the kept places only."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, mask_OI: Tensor, rest_OI: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask_OI)
        matrix_OI = values_N.new_zeros(mask_OI.shape) if rest_OI is None else rest_OI.clone()
        return matrix_OI.masked_scatter_(mask_OI, values_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (mask_OI,) = ctx.saved_tensors
        return gradients[0].masked_select(mask_OI), None, None


def rounded(value: Tensor, stored: torch.dtype) -> Tensor:
    """`value` rounded to what is stored, in its own dtype; the gradient passes straight through.

    Straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): steps too small for the
    stored dtype add up in `value` instead of being lost.
    """
    if stored == value.dtype:
        return value
    return value + (value.detach().to(stored).to(value.dtype) - value.detach())


class KeptValues(nn.Module):
    """A torch parametrization: an fp32 weight (O, I) made of its kept values (N,).

    The forward pass sees them rounded to `stored`, the dtype they will be saved in, so the model
    that is trained is the one that is saved. Places that are not kept hold `rest_OI`, or 0.
    """

    mask_OI: Tensor
    rest_OI: Tensor | None

    def __init__(self, mask_OI: Tensor, stored: torch.dtype, rest_OI: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask_OI", mask_OI, persistent=False)
        self.register_buffer("rest_OI", rest_OI, persistent=False)
        self.stored = stored

    def forward(self, values_N: Tensor) -> Tensor:
        """The weight (O, I) from its kept values."""
        values_N = rounded(values_N, self.stored)
        return cast(Tensor, _Place.apply(values_N, self.mask_OI, self.rest_OI))

    def right_inverse(self, weight_OI: Tensor) -> Tensor:
        """The kept values (N,) of a weight."""
        return weight_OI.detach().masked_select(self.mask_OI)


def attach(
    linear: nn.Module,
    mask_OI: Tensor,
    stored: torch.dtype = torch.float32,
    rest_OI: Tensor | None = None,
) -> nn.Parameter:
    """Make the fp32 `linear.weight` of trainable kept values (N,) from here on, and give them."""
    kept = KeptValues(mask_OI.to(linear.get_parameter("weight").device), stored, rest_OI)
    parametrize.register_parametrization(linear, "weight", kept, unsafe=True)
    values_N = cast(Any, linear.parametrizations)["weight"].original
    assert isinstance(values_N, nn.Parameter)
    values_N.requires_grad_(True)
    return values_N


@contextlib.contextmanager
def kept_values(
    module: nn.Module, masks: Mapping[str, Tensor]
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the block, fp32 weights are made of trainable kept values (N,), given by name.

    `masks` maps names of layers within `module` to boolean masks (O, I) of their weights. Places
    outside a mask stay as they are. After the block every weight is its old parameter again,
    holding the trained values. Raises InputError when a mask does not fit its weight.
    """
    layers = {name: module.get_submodule(name) for name in masks}
    for name, mask_OI in masks.items():
        _check_mask(name, layers[name].get_parameter("weight"), mask_OI)
    values: dict[str, nn.Parameter] = {}
    try:
        for name, mask_OI in masks.items():
            rest_OI = layers[name].get_parameter("weight").detach()
            values[name] = attach(layers[name], mask_OI, rest_OI=rest_OI)
        yield values
    finally:
        for name in values:
            with torch.no_grad():
                parametrize.remove_parametrizations(layers[name], "weight")


def _check_mask(name: str, weight_OI: Tensor, mask_OI: Tensor) -> None:
    if mask_OI.dtype != torch.bool or mask_OI.shape != weight_OI.shape:
        raise InputError(
            f"{name}: expected a boolean mask of shape {tuple(weight_OI.shape)}, "
            f"but it is {mask_OI.dtype} of shape {tuple(mask_OI.shape)}"
        )
