"""Where a run of gate training stands, on disk."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moiety.files import digest
from moiety.routers.together import whole
from moiety.training_state import (
    damaged,
    digest_of_sample,
    digest_of_tensor,
    load_state,
    save_state,
)


@dataclass(frozen=True)
class State:
    """All that a run needs to go on, whatever the number of processes.

    Tensors by name, the step, the history of evaluations, and the oracle's losses.
    """

    step: int
    oracle: dict[str, float]
    history: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def fingerprint(
    model: nn.Module,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    without: Collection[str] = (),
) -> str:
    """Name a run by its settings, its text (`tensors`, all of it) and its model (a sample).

    The model's tensors named in `without` do not count.
    """
    return digest(
        {
            "settings": settings,
            "text": {name: digest_of_tensor(t) for name, t in tensors.items()},
            "model": {
                name: _sample(tensor)
                for name, tensor in model.state_dict().items()
                if name not in without
            },
        }
    )


def _sample(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.numel() == 0:
        return str(type(tensor))
    return digest_of_sample(whole(tensor))


def save(folder: Path, run: str, state: State) -> None:
    """Make `state` the current one of `folder`.

    Raises OutputError when the folder cannot be written.
    """
    more = {"oracle": state.oracle, "history": state.history}
    save_state(folder, run, state.step, state.tensors, more)


def load(folder: Path, run: str) -> State | None:
    """The current state of `folder`, or None when no run has been there.

    Raises InputError when it belongs to another run or a file is damaged.
    """
    found = load_state(folder, run, "this model, text and settings")
    if found is None:
        return None
    content, tensors = found
    try:
        oracle, history = dict(content["oracle"]), list(content["history"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    return State(content["step"], oracle, history, tensors)
