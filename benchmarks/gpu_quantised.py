"""Weight-only quantised dense matrices in torch and torchao: what else makes weights small.

Every maker takes (O, I) and gives `input -> input @ weightᵀ`, or raises where it does not work; the
caller says which were left out. int4 has a scale for 128 columns, int8 one for a row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_GROUP = 128
_INNER_TILES = 8
Linear = Callable[[Tensor], Tensor]
Expert = Callable[[Tensor], Tensor]


def tinygemm_int4(weight_OI: Tensor) -> Linear:
    """torch's int4 product (tinygemm), which torchao and others call."""
    groups_OGS = weight_OI.float().unflatten(1, (-1, _GROUP))
    scale_OG = groups_OGS.abs().amax(-1) / 7
    codes_OI = (groups_OGS / scale_OG[..., None]).round().clamp(-8, 7).flatten(1).int() + 8
    pairs = (codes_OI[:, 0::2] << 4 | codes_OI[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES)
    both_GO2 = torch.stack([scale_OG, torch.zeros_like(scale_OG)], -1).bfloat16().transpose(0, 1)
    both_GO2 = both_GO2.contiguous()
    return lambda input: torch.ops.aten._weight_int4pack_mm(input, packed, _GROUP, both_GO2)


def torch_int8(weight_OI: Tensor) -> Linear:
    """torch's int8 weight-only product."""
    scale_O = weight_OI.float().abs().amax(1) / 127
    codes_OI = (weight_OI.float() / scale_O[:, None]).round().to(torch.int8)
    scale_O = scale_O.bfloat16()
    return lambda input: torch.ops.aten._weight_int8pack_mm(input, codes_OI, scale_O)


def torchao_int8(weight_OI: Tensor) -> Linear:
    """torchao's int8 weight-only linear, compiled as its documentation says to."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore

    rows, columns = weight_OI.shape
    linear = nn.Linear(columns, rows, bias=False, dtype=weight_OI.dtype, device=weight_OI.device)
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    quantize_(linear, Int8WeightOnlyConfig())
    return lambda input: _compiled(input, linear.weight)


@torch.compile(dynamic=False)
def _compiled(input: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(input, weight)


MAKERS: dict[str, Callable[[Tensor], Linear]] = {
    "torch_int4": tinygemm_int4,
    "torch_int8": torch_int8,
    "torchao_int8": torchao_int8,
}


def experts(
    pairs: Sequence[tuple[Tensor, ...]],
) -> tuple[dict[str, list[Expert]], dict[str, str]]:
    """Gated experts of (gate and up, down) matrices for every maker that works, and why others not."""
    found: dict[str, list[Expert]] = {}
    refused: dict[str, str] = {}
    for name, make in MAKERS.items():
        try:
            made = [_expert(make(gate_up), make(down)) for gate_up, down in pairs]
            probe = torch.randn(3, pairs[0][0].shape[1], device="cuda").bfloat16()
            expected = _expert(*(_dense(matrix) for matrix in pairs[0]))(probe).float()
            error = float((made[0](probe).float() - expected).norm() / expected.norm())
            if not error < _error(name):
                raise ValueError(f"{error:g} off the dense result")
            found[name] = made
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, refused


def _error(name: str) -> float:
    """The rounding that a kind of values may cost on Gaussian weights."""
    return 0.3 if "int4" in name else 0.03


def _dense(matrix: Tensor) -> Linear:
    return lambda input: functional.linear(input, matrix)


def _expert(gate_up: Linear, down: Linear) -> Expert:
    def run(input: Tensor) -> Tensor:
        gate, up = gate_up(input).chunk(2, dim=-1)
        return down(functional.silu(gate) * up)

    return run
