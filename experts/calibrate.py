"""Calibration of one decoder block: what each of its linear layers is fed.

W windows of a batch, C context length, D model width, I in features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.experts.sites import at_sites


@dataclass
class BlockBatch:
    """One batch on its way through the blocks: hidden states, the other arguments, the mask.

    `hidden_WCD` is what the pruned blocks put out, `dense_WCD`, where it is wanted, what the
    unpruned ones do.
    """

    hidden_WCD: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    mask_WC: Tensor
    dense_WCD: Tensor | None = None

    def run(self, block: nn.Module, hidden_WCD: Tensor | None = None) -> Tensor:
        """The block's output hidden states, in fp32; fed others than the batch's own if given."""
        hidden_WCD = self.hidden_WCD if hidden_WCD is None else hidden_WCD
        output = block(hidden_WCD.float(), *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a model's decoder blocks, found by their number in the configuration."""
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise InputError(
        f"expected a decoder with {count} blocks, but found no such list in {type(model).__name__}"
    )


def linears_of(block: nn.Module, sites: str) -> dict[str, nn.Linear]:
    """Linear layers of a block that `sites` names, by their name within it."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and at_sites(name, sites)
    }


class GramCollector:
    """Sums x xᵀ over the unpadded tokens that reach each linear layer, in fp32.

    Layers that are fed the same tensor (query, key and value; gate and up) share one matrix.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self._linears = linears
        self._leader: dict[str, str] = {}
        self._grams: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[Tensor, str]] = {}
        self._mask_WC = torch.empty(0, dtype=torch.bool)

    def _listener(self, name: str) -> Any:
        def listen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            input = inputs[0]
            _, leader = self._seen.setdefault(id(input), (input, name))
            if self._leader.setdefault(name, leader) != name:
                return
            rows_TI = input.reshape(-1, input.shape[-1])[self._mask_WC.reshape(-1)].float()
            if name not in self._grams:
                self._grams[name] = rows_TI.new_zeros(rows_TI.shape[1], rows_TI.shape[1])
            self._grams[name].addmm_(rows_TI.T, rows_TI)

        return listen

    @torch.no_grad()
    def run(
        self, block: nn.Module, batches: Sequence[BlockBatch], outputs: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Run all batches through the block and give the Gram matrix (I, I) of each layer.

        The block's outputs are appended to `outputs`, if given.
        """
        handles = [
            linear.register_forward_pre_hook(self._listener(name))
            for name, linear in self._linears.items()
        ]
        try:
            for batch in batches:
                self._mask_WC = batch.mask_WC
                self._seen.clear()
                output = batch.run(block)
                if outputs is not None:
                    outputs.append(output.to(batch.hidden_WCD.dtype))
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()
        silent = [name for name in self._linears if name not in self._leader]
        if silent:
            raise InputError(
                f"expected every linear layer of a block to be used, but {silent[0]} never is"
            )
        return {name: self._grams[leader] for name, leader in self._leader.items()}


@torch.no_grad()
def advance(block: nn.Module, batches: Sequence[BlockBatch]) -> None:
    """Replace each batch's hidden states by the block's output, so the next block can follow."""
    for batch in batches:
        batch.hidden_WCD = batch.run(block).to(batch.hidden_WCD.dtype)


@torch.no_grad()
def advance_dense(block: nn.Module, batches: Sequence[BlockBatch]) -> list[Tensor]:
    """Send the unpruned model's hidden states through the block while it is still unpruned.

    Gives what they become, (W, C, D) for each batch that has them, in the dtype they came in.
    """
    outputs: list[Tensor] = []
    for batch in batches:
        if batch.dense_WCD is not None:
            batch.dense_WCD = batch.run(block, batch.dense_WCD).to(batch.dense_WCD.dtype)
            outputs.append(batch.dense_WCD)
    return outputs
