"""Where a training run can be followed: any of accelerate's experiment trackers, by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from moiety.errors import InputError

PROJECT = "moiety-gates"
PACKAGES = {"comet_ml": "comet-ml"}
"""What `pip install` calls a tracker, where it is not the tracker's own name."""


def check_trackers(names: Sequence[str], log_dir: Path | None) -> None:
    """Raise InputError for an unknown tracker, one not installed, or one without a `log_dir`."""
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(
                f"trackers must be of {', '.join(LOGGER_TYPE_TO_CLASS)}, but one is {name!r}"
            )
        if name not in installed:
            raise InputError(
                f"expected the package of tracker {name!r} to be installed, but it is not; "
                f"run pip install {PACKAGES.get(name, name)}, or leave the tracker out"
            )
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and log_dir is None:
            raise InputError(f"log_dir must be a folder for tracker {name!r}, but it is None")


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any]) -> None:
    """Start those that the accelerator was made with, with the run's settings as plain values."""
    if accelerator.log_with:
        plain = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in config.items()
        }
        accelerator.init_trackers(PROJECT, config=plain)


def stop_trackers(accelerator: Accelerator) -> None:
    """Let them write what they hold.

    Not accelerate's `end_training`, which also destroys the caller's process group.
    """
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
