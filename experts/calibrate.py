"""Calibration block by block: what each linear layer of one decoder block is fed.

W windows of a batch, C context length, D model width, I in features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.text import Windows


class _Captured(Exception):
    """Ends a forward pass once the first block's inputs are known."""


@dataclass
class BlockBatch:
    """One batch on its way through the blocks: hidden states, the other arguments, the mask."""

    hidden_WCD: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    mask_WC: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """The block's output hidden states."""
        output = block(self.hidden_WCD, *self.arguments, **self.keywords)
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


def capture(model: nn.Module, windows: Windows, batch_size: int) -> list[BlockBatch]:
    """The inputs of the first block for every batch of calibration windows."""
    batches: list[BlockBatch] = []
    _, blocks = decoder_blocks(model)

    def listen(_block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = keywords.pop("hidden_states", None)
        hidden, rest = (arguments[0], arguments[1:]) if hidden is None else (hidden, arguments)
        batches.append(BlockBatch(hidden, rest, keywords, part.mask_WC.bool()))
        raise _Captured

    handle = blocks[0].register_forward_pre_hook(listen, with_kwargs=True)
    try:
        for part in windows.batches(batch_size):
            try:
                model(input_ids=part.ids_WC, attention_mask=part.mask_WC, use_cache=False)
            except _Captured:
                continue
    finally:
        handle.remove()
    return batches


class GramCollector:
    """Sums x xᵀ over the unpadded tokens that reach each linear layer, in fp32."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self.grams = {
            name: torch.zeros(linear.in_features, linear.in_features)
            for name, linear in linears.items()
        }
        self._handles = [
            linear.register_forward_pre_hook(self._listener(name))
            for name, linear in linears.items()
        ]
        self._mask_WC = torch.empty(0, dtype=torch.bool)

    def _listener(self, name: str) -> Any:
        def listen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            input_TI = inputs[0].reshape(-1, inputs[0].shape[-1])[self._mask_WC.reshape(-1)]
            input_TI = input_TI.float()
            self.grams[name].addmm_(input_TI.T, input_TI)

        return listen

    def run(self, block: nn.Module, batches: Sequence[BlockBatch]) -> dict[str, Tensor]:
        """Run all batches through the block and give the Gram matrix (I, I) of each layer."""
        try:
            for batch in batches:
                self._mask_WC = batch.mask_WC
                batch.run(block)
        finally:
            for handle in self._handles:
                handle.remove()
        return self.grams


def advance(block: nn.Module, batches: Sequence[BlockBatch]) -> None:
    """Replace each batch's hidden states by the block's output, so the next block can follow."""
    for batch in batches:
        batch.hidden_WCD = batch.run(block)


def linears_of(block: nn.Module, sites: str) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of a block that `sites` names: `ffn`, `attention` or `all`."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and sites in ("all", site_of(name)):
            yield name, module


def site_of(name: str) -> str:
    """Whether a linear layer belongs to `attention` or `ffn`, by the modules it stands in."""
    parts = name.lower().split(".")
    return "attention" if any("attn" in part or "attention" in part for part in parts) else "ffn"
