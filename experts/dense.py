"""What stays dense of a packed model, read as fast as its experts while few tokens are decoded.

torch's product of one to a dozen tokens reads a matrix more slowly than the memory gives it, and
head and attention are a third of what a decoded token of a mixture reads. Weights, names and files
are nn.Linear's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moiety.experts import kernels

_PLAIN = (Tensor, nn.Parameter)


def linear(input: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`input @ weightᵀ + bias`, (..., I) to (..., O), by whichever product is the faster one.

    torch's own where there is anything but plain tensors on the CPU (not those that are shared out,
    quantized or fake), and under torch.compile and autocast, which know better.
    """
    plain = (
        type(weight_OI) in _PLAIN
        and type(input) in _PLAIN
        and weight_OI.device.type == "cpu"
        and input.dtype == weight_OI.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
    if not plain or not kernels.reads_faster(input, weight_OI):
        return functional.linear(input, weight_OI, bias_O)
    output = kernels.dense_linear(input, weight_OI)
    return output if bias_O is None else output + bias_O


class DenseLinear(nn.Linear):
    """nn.Linear whose few tokens are multiplied by `linear` above."""

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weightᵀ + bias`, (..., I) to (..., O)."""
        return linear(input, self.weight, self.bias)


def read_fast(model: nn.Module) -> None:
    """Let every plain linear layer of a model read its weight so."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
