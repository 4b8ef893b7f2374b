"""Modules that hold packed weights and call the sparse ops: drop-in for Linear and MoE experts.

Parameter names follow transformers: the kept values take the dense parameter's own name, the
mask is `<name>_mask` and the scales of integer values `<name>_scale`, so its checkpoint
conversions and sharding plans find them all. Once loaded, the kernels' own layout takes their place:
tiles on the CPU, planes on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import (
    ExpertsInterface,
    _default_apply_gate,
    use_experts_implementation,
)

from moiety.errors import InputError
from moiety.experts import kernels, packing
from moiety.experts.kernels.reference import ACTIVATIONS
from moiety.experts.packing import LARGEST_CODE
from moiety.experts.pattern import Pattern

TILED_PATTERN = Pattern(2, 4)
ENDS = ("", "_mask", "_scale")
# The tensors of the kernels' own layout, in the order of the fields of `kernels.Weights`.
OWN_ENDS = ("_tiles", "_codes", "_codes_scale")


def _resident_bytes(tensor: Tensor) -> int:
    steps = tensor.stride(0) * len(tensor) if tensor.dim() == 3 else tensor.numel()
    return max(steps, tensor.numel()) * tensor.element_size()


def _here(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class PackedModule(nn.Module):
    """Holds packed matrices, or stacks of them, under given names."""

    def __init__(self, pattern: Pattern, values: str | None) -> None:
        super().__init__()
        self.pattern = pattern
        self.values = values
        self.widths: dict[str, int] = {}
        self.prefill = False
        self._ready = False
        self._tiled: dict[str, tuple[int, int, str]] = {}

    def _empty(self, name: str, stack: tuple[int, ...], rows: int, in_features: int) -> None:
        """Parameters for a stack of matrices (rows, in_features), not yet filled."""
        self.widths[name] = in_features
        kept = packing.stored_shape(self.pattern, self.values, rows, in_features)
        dtype = packing.DTYPES[self.values or "bf16"]
        self._hold(name, torch.empty(*stack, *kept, dtype=dtype))
        mask = torch.zeros(*stack, rows, -(-in_features // 8), dtype=torch.uint8)
        self._hold(f"{name}_mask", mask)
        if self.values in LARGEST_CODE:
            scale = torch.empty(*stack, *packing.scale_shape(rows, in_features))
            self._hold(f"{name}_scale", scale.to(torch.bfloat16))
        else:
            self.register_parameter(f"{name}_scale", None)

    def _hold_packed(self, name: str, packed: packing.Packed) -> None:
        """Parameters for one matrix that is there already."""
        self.widths[name] = packed.in_features
        for end in ENDS:
            self.register_parameter(f"{name}{end}", None)
        for full_name, tensor in packed.tensors(name).items():
            self._hold(full_name, tensor)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def packed(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """The values, mask and scales (None unless the values are integers) called `name`.

        As they are stored; made again from the tiles where those took their place. Of matrices
        spread over processes, this one's.
        """
        if name in self._tiled:
            return self._from_tiles(name)
        values, mask, scale = (_here(getattr(self, f"{name}{end}")) for end in ENDS)
        assert values is not None and mask is not None
        return values, mask, scale

    @property
    def packed_names(self) -> list[str]:
        """Names of every stored parameter of a packed matrix."""
        ends = ("", "_mask", *(["_scale"] if self.values in LARGEST_CODE else []))
        return [f"{name}{end}" for name in self.widths for end in ends]

    @property
    def packed_bytes(self) -> int:
        """Resident bytes of all packed matrices, room behind each of a stack included."""
        return sum(_resident_bytes(tensor) for tensor in self.packed_tensors)

    @property
    def packed_tensors(self) -> list[Tensor]:
        """What holds the packed matrices now: the stored tensors, or the kernels' own."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        own = {*self.packed_names, *(f"{name}{end}" for name in self.widths for end in OWN_ENDS)}
        return [tensor for name, tensor in tensors.items() if name in own]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all packed matrices as they are stored, whatever the kernels hold them as."""
        return sum(map(self._stored_bytes_of, self.widths))

    def _stored_bytes_of(self, name: str) -> int:
        if name not in self._tiled:
            return sum(tensor.nbytes for tensor in self.packed(name) if tensor is not None)
        held = self.weights(name)
        shape = held.rows, held.columns
        return held.stack * packing.packed_bytes(self.pattern, held.stored_kind, *shape)

    def weights(self, name: str) -> kernels.Weights:
        """The matrices called `name` as the sparse ops take them."""
        if name in self._tiled:
            tiles, codes, scale = (self._buffers.get(f"{name}{end}") for end in OWN_ENDS)
            assert tiles is not None
            return kernels.Weights(tiles, codes, scale, None, *self._tiled[name])
        values, mask, scale = self.packed(name)
        weights = kernels.packed(values, mask, self.widths[name], scale)
        return weights._replace(starts=self._buffers.get(f"{name}_starts"))

    def prepare(self) -> None:
        """Make ready for the kernels of this device, if they will work on these matrices.

        2:4 matrices get the kernels' own layout; for flat values it is noted where each row begins.
        """
        self._ready = True
        if self.pattern == TILED_PATTERN:
            self._tile()
        elif not self.pattern.group:
            for name in self.widths:
                starts = kernels.with_starts(self.weights(name)).starts
                if starts is not None:
                    self.register_buffer(f"{name}_starts", starts, persistent=False)

    def _tile(self) -> None:
        """Bring 2:4 matrices into the kernels' own layout.

        It takes the stored tensors' place; `state_dict` and `packed` still give those, and any move
        to another device or dtype goes through them. Nothing happens where there are no kernels, or
        to matrices spread over processes, which are saved as such.
        """
        tiles = {name: self._tiles_of(name) for name in self.widths if name not in self._tiled}
        if None in tiles.values():
            return
        for name, tiled in tiles.items():
            assert tiled is not None
            self._tiled[name] = (tiled.rows, tiled.columns, tiled.kind)
            for end in ENDS:
                self._parameters.pop(f"{name}{end}", None)
            own = (tiled.values, tiled.mask, tiled.scale)
            for end, tensor in zip(OWN_ENDS, own, strict=True):
                if tensor is not None:
                    self.register_buffer(f"{name}{end}", tensor, persistent=False)

    def untile(self) -> None:
        """Back to the stored tensors, bit for bit."""
        for name in list(self._tiled):
            tensors = self._from_tiles(name)
            del self._tiled[name]
            for end in OWN_ENDS:
                self._buffers.pop(f"{name}{end}", None)
            for end, tensor in zip(ENDS, tensors, strict=True):
                if tensor is None:
                    self.register_parameter(f"{name}{end}", None)
                else:
                    self._hold(f"{name}{end}", tensor)

    def _parts(self, name: str) -> int:
        """Matrices that the CPU's tiles hold for each stored one."""
        return 1

    def _tiles_of(self, name: str) -> kernels.Weights | None:
        tensors = [tensor for end in ENDS if (tensor := getattr(self, f"{name}{end}")) is not None]
        spread = any(isinstance(tensor, DTensor) for tensor in tensors)
        if spread or len({tensor.device for tensor in tensors}) > 1:
            return None
        stored = self.weights(name)
        parts = self._parts(name) if stored.values.device.type == "cpu" else 1
        apart = stored.regrouped(stored.stack * parts) if parts > 1 else stored
        return kernels.tiled(apart, prefill=self.prefill)

    def _from_tiles(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        tiled = self.weights(name)
        stored = kernels.untiled(tiled)
        parts = self._parts(name) if tiled.is_tiled else 1
        values, mask, scale, *_ = stored.regrouped(stored.stack // parts) if parts > 1 else stored
        assert mask is not None
        if not self._is_single():
            return values, mask, scale
        return values[0], mask[0], None if scale is None else scale[0]

    def _is_single(self) -> bool:
        """Whether one matrix is stored instead of a stack."""
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        if self._tiled:
            weights = self.weights(next(iter(self._tiled)))
            dtype = packing.DTYPES[weights.stored_kind]
            probe = torch.empty(0, dtype=dtype, device=weights.values.device)
            moved = fn(probe)
            if moved.device != probe.device or moved.dtype != probe.dtype:
                self.untile()
        super()._apply(fn, recurse)
        if self._ready and self.pattern == TILED_PATTERN:
            self._tile()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._tiled:
            for end, tensor in zip(ENDS, self._from_tiles(name), strict=True):
                if tensor is not None:
                    destination[f"{prefix}{name}{end}"] = tensor

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        ready = bool(self._tiled) or any(f"{name}_starts" in self._buffers for name in self.widths)
        if any(f"{prefix}{name}" in state_dict for name in self._tiled):
            self.untile()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if ready:
            self.prepare()

    def check(self, name: str) -> None:
        """Raise InputError that names the tensor unless every matrix is validly packed.

        What was offloaded to disk (meta device) is not read back for this.
        """
        for attribute, width in self.widths.items():
            values, mask, scale = self.packed(attribute)
            if not values.is_meta:
                full_name = f"{name}.{attribute}"
                packing.check(full_name, values, mask, width, self.pattern, scale, self.values)

    def _stored_as(self) -> str:
        return f"{self.pattern}" if self.values is None else f"{self.pattern}, {self.values}"


def favour_prefill(model: nn.Module) -> None:
    """Let every packed module of a model on a GPU keep what cuSPARSELt needs for long prompts.

    It multiplies many tokens about a third faster than dense matrices are, for 10 bits a weight
    instead of 9. Nothing changes on the CPU, for integer values, or without cuSPARSELt.
    """
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.untile()
            module.prefill = True
            module.prepare()


class SparseLinear(PackedModule):
    """A linear layer whose weight stays packed.

    `weight` (O, K) or flat, `weight_mask` (O, B) and, for integer values, `weight_scale` (O, G).
    `values` None stands for whichever floating-point type is loaded.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: Pattern,
        values: str | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(pattern, values)
        self.in_features = in_features
        self.out_features = out_features
        self._empty("weight", (), out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weightᵀ + bias`, (..., I) to (..., O)."""
        output = kernels.sparse_linear(input, self.weights("weight"))
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Sizes, pattern and kind of values, shown by print(model)."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._stored_as()}"


def _sparse_forward(
    module: "SparseExperts", hidden_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor
) -> Tensor:
    gate_up, down = module.weights("gate_up_proj"), module.weights("down_proj")
    if getattr(module, "_is_expert_parallel", False):
        # Routes to other processes' experts come with the number after the last and no weight.
        experts_TA = experts_TA.clamp(max=module.num_experts - 1)
    return kernels.sparse_experts(
        hidden_TD, gate_up, down, experts_TA, weights_TA, module.activation
    )


class SparseInterface(ExpertsInterface):
    """The names transformers switches between (prefill, decode), all served by our op."""

    _global_mapping = {"grouped_mm": _sparse_forward, "batched_mm": _sparse_forward}  # noqa: RUF012


class SparseExperts(PackedModule):
    """All experts of one routed block, packed; takes the place of a stock `*Experts` module.

    `gate_up_proj` (E, 2F, K) or flat (E, n), gate rows before up rows; `down_proj` (E, D, K') or
    (E, n'); masks (E, rows, B); scales (E, rows, G) for integer values. E experts, D model
    width, F expert width. InputError when a flat int4 gate would end in the middle of a byte.
    """

    def __init__(
        self, config: Any, stock: nn.Module, pattern: Pattern, values: str | None = None
    ) -> None:
        super().__init__(pattern, values)
        check_gated(stock)
        gate_up, down = stock.get_parameter("gate_up_proj"), stock.get_parameter("down_proj")
        self.num_experts, rows, self.hidden_dim = gate_up.shape
        self.intermediate_dim = down.shape[-1]
        self.activation = activation_name(config)
        check_fusable(pattern, values, self.intermediate_dim, self.hidden_dim)
        self._empty("gate_up_proj", (self.num_experts,), rows, self.hidden_dim)
        self._empty("down_proj", (self.num_experts,), self.hidden_dim, self.intermediate_dim)

    def _parts(self, name: str) -> int:
        return 2 if name == "gate_up_proj" else 1

    def _is_single(self) -> bool:
        return False

    def forward(self, hidden_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Weighted sum of each token's experts (T, D)."""
        return _sparse_forward(self, hidden_TD, experts_TA, weights_TA)

    def extra_repr(self) -> str:
        """Sizes, pattern and kind of values, shown by print(model)."""
        return (
            f"experts={self.num_experts}, width={self.hidden_dim}, "
            f"expert_width={self.intermediate_dim}, {self._stored_as()}"
        )


use_experts_implementation(SparseExperts, experts_interface=SparseInterface())


def check_gated(stock: nn.Module) -> None:
    """Raise InputError unless a stock experts module computes `down(act(gate) ⊙ up)` and no more."""
    strange = {
        "biases": getattr(stock, "has_bias", False),
        "transposed matrices": getattr(stock, "is_transposed", False),
        "interleaved gates": not getattr(stock, "is_concatenated", True),
        "no gate": not getattr(stock, "has_gate", True),
        "a norm after each expert": getattr(stock, "has_post_expert_norm", False),
        "a gate of its own": getattr(type(stock), "_apply_gate", _default_apply_gate)
        is not _default_apply_gate,
    }
    found = [name for name, is_so in strange.items() if is_so]
    if found:
        raise InputError(
            f"expected experts that are plain gated FFNs, but {type(stock).__name__} has "
            f"{' and '.join(found)}; such experts cannot be packed yet"
        )


def check_fusable(pattern: Pattern, values: str | None, rows: int, in_features: int) -> None:
    """Raise InputError unless a packed gate (rows, in_features) can stand before its up matrix."""
    kept = pattern.values_shape(rows, in_features)
    if values == "int4" and len(kept) == 1 and kept[0] % 2:
        raise InputError(
            f"expected an even number of kept values in every expert's gate matrix, so that int4 "
            f"ones fill whole bytes, but pattern {pattern} keeps {kept[0]} of ({rows}, "
            f"{in_features}); choose another density or int8"
        )


def activation_name(config: Any) -> str:
    """The experts' activation in a transformers configuration; ValueError if we have none such."""
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"expected an activation in {ACTIVATIONS}, but the model uses {name!r}")
    return name
