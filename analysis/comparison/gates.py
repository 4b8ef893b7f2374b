"""Gates exchanged between two models: do the routers do the same thing?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moiety.analysis.losses import LabelledWindows
from moiety.analysis.results.comparison import Comparison, GateSwap
from moiety.analysis.trace.file import HEADER
from moiety.analysis.trace.watching import changeable_gates
from moiety.compose.opening import open_any
from moiety.errors import InputError
from moiety.routers import find_gates
from moiety.text import Windows, read_documents, token_windows


def gate_swap(
    first: str | Path,
    second: str | Path,
    data: Mapping[str, str | Path],
    *,
    context_length: int = 512,
    windows: int = 32,
    batch_size: int = 8,
) -> GateSwap:
    """Losses of two models on labelled text, each with its own gates and with the other's.

    Raises InputError when their gates or vocabularies do not fit each other.
    """
    for model in (first, second):
        if (Path(model) / HEADER).is_file():
            raise InputError(
                f"expected a model whose gates are exchanged on the data, but {model} is a trace; "
                "two traces are compared without data"
            )
    one, other = open_any(first), open_any(second)
    cut = {
        domain: token_windows(one.tokenizer, read_documents(path), context_length, windows)
        for domain, path in data.items()
    }
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError("expected two models of one vocabulary, but their tokenizers differ")
    return gate_swap_of(one.model, other.model, cut, batch_size)


def gate_swap_of(
    first: Any, second: Any, data: Mapping[str, Windows], batch_size: int = 8
) -> GateSwap:
    """As `gate_swap`, of models in memory and windows of text."""
    text = LabelledWindows.of(data)

    def losses(model: nn.Module) -> Any:
        return text.by_document(text.losses(model, batch_size))

    _check(first, second)
    one_M, other_M = losses(first), losses(second)
    with _exchanged(first, second):
        one_changed_M, other_changed_M = losses(first), losses(second)
    by_domain = text.documents.by_domain
    names = [str(getattr(model.config, "name_or_path", "")) for model in (first, second)]
    return GateSwap(
        models=(names[0], names[1]),
        first=by_domain(one_M),
        second=by_domain(other_M),
        first_with_second=by_domain(one_changed_M),
        second_with_first=by_domain(other_changed_M),
        change_first=by_domain(one_changed_M - one_M),
        change_second=by_domain(other_changed_M - other_M),
    )


def _check(first: nn.Module, second: nn.Module) -> None:
    shapes = [
        {
            f"{gate.name}.{name}": tuple(value.shape)
            for gate in changeable_gates(model)
            for name, value in gate.module.state_dict().items()
        }
        for model in (first, second)
    ]
    if shapes[0] != shapes[1]:
        strange = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise InputError(
            f"expected two models whose gates have the same shapes, but only one has {strange[0]} "
            f"of {strange[1]}"
        )


def with_gate_swap(found: Comparison, swap: GateSwap) -> Comparison:
    """A comparison of two traces with what their models' exchanged gates do.

    Models are known by the last part of their names; a swap the other way round is turned.
    InputError when it is of other models or other domains.
    """
    traced = [Path(name).name for name in (found.first, found.second)]
    swapped = [Path(name).name for name in swap.models]
    if sorted(traced) != sorted(swapped):
        raise InputError(
            f"expected the gates of {found.first} and {found.second} exchanged, but they are those "
            f"of {swap.models[0]} and {swap.models[1]}"
        )
    if set(swap.first) != set(found.domains):
        raise InputError(
            f"expected the gates exchanged on the domains {', '.join(found.domains)}, but it was "
            f"on {', '.join(swap.first)}"
        )
    return replace(found, gate_swap=swap if traced == swapped else swap.reversed)


@contextmanager
def _exchanged(first: nn.Module, second: nn.Module) -> Iterator[None]:
    _exchange(first, second)
    try:
        yield
    finally:
        _exchange(first, second)


@torch.no_grad()
def _exchange(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(find_gates(first), find_gates(second), strict=True):
        states = [
            {name: value.clone() for name, value in gate.module.state_dict().items()}
            for gate in (one, other)
        ]
        one.module.load_state_dict(states[1])
        other.module.load_state_dict(states[0])
