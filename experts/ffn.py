"""The FFN of a decoder block, found by its structure, and cut down to some of its neurons.

D model width, F neurons, S of them kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moiety.errors import InputError

WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
ADVICE = "remove weights instead (2:4 or another pattern)"


@dataclass(frozen=True)
class FeedForward:
    """Linear layers of an FFN by their names within the block.

    `down` (D, F) reads what F neurons put out. `ups` make it: two of F rows (gate and up), one
    of 2F (gate above up) or one of F (no gate); `ups` maps each to how often it holds F rows.
    """

    width: int
    down: str
    ups: Mapping[str, int]

    def cut(self, block: nn.Module, kept_S: Tensor, down_DS: Tensor) -> dict[str, Tensor]:
        """Make the FFN of `block` that of the kept neurons; gives its new tensors by name.

        `down_DS` are the columns of `down`. Biases of `ups` lose the same rows; that of `down`
        stays.
        """
        new = {f"{self.down}.weight": down_DS}
        for name, copies in self.ups.items():
            rows = torch.cat([kept_S + copy * self.width for copy in range(copies)])
            for part, tensor in block.get_submodule(name).named_parameters():
                new[f"{name}.{part}"] = tensor.detach()[rows]
        for name, tensor in new.items():
            owner, _, part = name.rpartition(".")
            setattr(block.get_submodule(owner), part, nn.Parameter(tensor, requires_grad=False))
        return new


def width_field(config: PretrainedConfig) -> str:
    """The field of a configuration that says how many neurons every FFN has.

    Raises InputError when none does.
    """
    text: Any = config.get_text_config()
    for field in WIDTH_FIELDS:
        if isinstance(getattr(text, field, None), int):
            return field
    raise InputError(
        f"expected a configuration that names one FFN width ({', '.join(WIDTH_FIELDS)}), but that "
        f"of {config.model_type} does not; {ADVICE}"
    )


def find_ffn(block: nn.Module, width: int, place: str) -> FeedForward:
    """The one FFN of a block with `width` neurons.

    Raises InputError, naming `place`, when there is none of linear layers or more than one.
    """
    found = [
        feed_forward
        for name, module in block.named_modules()
        if (feed_forward := _of_module(name, module, width)) is not None
    ]
    if len(found) != 1:
        count = "more than one" if found else "none"
        raise InputError(
            f"expected one FFN of linear layers with {width} neurons in {place}, but there is "
            f"{count} (mixtures of experts have no such FFN); {ADVICE}"
        )
    return found[0]


def _of_module(name: str, module: nn.Module, width: int) -> FeedForward | None:
    linears = {
        f"{name}.{child}".removeprefix("."): layer
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    }
    downs = [one for one, layer in linears.items() if layer.in_features == width]
    ups = {
        one: layer.out_features // width
        for one, layer in linears.items()
        if layer.out_features in (width, 2 * width) and one not in downs
    }
    if len(downs) != 1 or sorted(ups.values()) not in ([1], [2], [1, 1]):
        return None
    return FeedForward(width, downs[0], ups)
