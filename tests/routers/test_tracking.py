"""Trackers hear every step and evaluation, and are refused before any work where they cannot."""

import dataclasses
import json
import sqlite3
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moiety.errors import InputError
from moiety.routers import TrainReport, TrainSettings, train

SETTINGS = TrainSettings(steps=4, eval_every=2, learning_rate=1e-2, batch_size=4)


def _train(toys: ModuleType, settings: TrainSettings) -> TrainReport:
    return train(toys.mixtral(), toys.domains(3), toys.domains(3, seed=1), toys.OWN, settings)


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder / "moiety-gates")).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_holds_every_step_and_evaluation(toys: ModuleType, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, objective="regret")
    logged = dataclasses.replace(settings, trackers=("tensorboard",), log_dir=tmp_path)
    report = _train(toys, logged)
    assert report.history == _train(toys, settings).history
    scalars = _scalars(tmp_path)
    for name in ("loss", "regret", "max_violation", "load_entropy", "dead_experts", "own_share"):
        expected = {one.step: getattr(one, name) for one in report.history}
        assert scalars[f"heldout/{name}"] == pytest.approx(expected)
    law = {one.step: one.domain_losses["law"] for one in report.history}
    assert scalars["heldout/loss/law"] == pytest.approx(law)
    for name in ("loss", "language", "regret", "domain", "balance", "z"):
        assert list(scalars[f"train/{name}"]) == [1, 2, 3, 4]
    parts = {name: scalars[f"train/{name}"][4] for name in settings.loss_weights()}
    total = sum(weight * parts[name] for name, weight in settings.loss_weights().items())
    assert scalars["train/loss"][4] == pytest.approx(total)


def test_where_a_run_is_followed_does_not_make_it_another(toys: ModuleType, tmp_path: Path) -> None:
    kept = dataclasses.replace(SETTINGS, checkpoint=tmp_path / "state")
    report = _train(toys, kept)
    again = dataclasses.replace(kept, trackers=("tensorboard",), log_dir=tmp_path / "log")
    assert _train(toys, again).history == report.history
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("aim",), "pip install aim"),
        (("swanlab",), "pip install swanlab"),
        (("tensorboard",), "log_dir must be a folder"),
        (("paper",), "trackers must be of .*tensorboard"),
    ],
)
def test_trackers_that_cannot_work_are_refused_first(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SETTINGS, trackers=names)


def test_trackio_keeps_every_step_on_this_machine(
    toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    report = _train(toys, dataclasses.replace(SETTINGS, trackers=("trackio",)))
    with sqlite3.connect(tmp_path / "moiety-gates.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics").fetchall()
    values: dict[int, dict[str, float]] = {}
    for step, metrics in rows:
        values.setdefault(step, {}).update(json.loads(metrics))
    assert [step for step in sorted(values) if "train/loss" in values[step]] == [1, 2, 3, 4]
    regrets = {step: one["heldout/regret"] for step, one in values.items() if step % 2 == 0}
    assert regrets == pytest.approx({one.step: one.regret for one in report.history})
