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

    torch's own wherever gradients may be asked for, for anything but plain tensors on the CPU (not
    those that are shared out, quantized or fake), and under torch.compile and autocast, which know
    better. A bias is added to the rounded product.
    """
    tensors = [input, weight_OI] if bias_O is None else [input, weight_OI, bias_O]
    plain = not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    ) and all(
        type(tensor) in _PLAIN
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.dtype == input.dtype
        for tensor in tensors
    )
    if not plain or weight_OI.dim() != 2 or not kernels.reads_faster(input, weight_OI):
        return functional.linear(input, weight_OI, bias_O)
    output = kernels.dense_linear(input, weight_OI)
    return output if bias_O is None else output + bias_O


class DenseLinear(nn.Linear):
    """nn.Linear whose few tokens are multiplied by `linear` above."""

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weightᵀ + bias`, (..., I) to (..., O)."""
        return linear(input, self.weight, self.bias)


def read_fast(model: nn.Module) -> None:
    """Let every plain linear layer of a model be a DenseLinear.

    Where accelerate has spread the model over devices, its hooks go on calling torch's product.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
