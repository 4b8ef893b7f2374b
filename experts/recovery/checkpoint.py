"""Where a recovery run stands, on disk."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moiety.experts.recovery.settings import Evaluation
from moiety.files import digest
from moiety.training_state import (
    damaged,
    digest_of_sample,
    digest_of_tensor,
    load_state,
    save_state,
)


@dataclass(frozen=True)
class State:
    """All that a run needs to go on: step, evaluations so far, tensors by name."""

    step: int
    history: list[Evaluation]
    tensors: dict[str, Tensor]


def fingerprint(
    settings: Mapping[str, Any], text: Mapping[str, Tensor], models: Mapping[str, Tensor]
) -> str:
    """Name a run by its settings, its text (all of it) and its models (a sample of them)."""
    return digest(
        {
            "settings": dict(settings),
            "text": {name: digest_of_tensor(t) for name, t in text.items()},
            "models": {name: digest_of_sample(t) for name, t in models.items()},
        }
    )


def save(folder: Path, run: str, state: State) -> None:
    """Make `state` the current one of `folder`.

    Raises OutputError when the folder cannot be written.
    """
    more = {"history": [asdict(evaluation) for evaluation in state.history]}
    save_state(folder, run, state.step, state.tensors, more)


def load(folder: Path, run: str) -> State | None:
    """The current state of `folder`, or None when no run has been there.

    Raises InputError when it belongs to another run or a file is damaged.
    """
    found = load_state(folder, run, "these models, text and settings")
    if found is None:
        return None
    content, tensors = found
    try:
        history = [Evaluation(**evaluation) for evaluation in content["history"]]
    except (KeyError, TypeError) as error:
        raise damaged(folder, error) from error
    return State(content["step"], history, tensors)
