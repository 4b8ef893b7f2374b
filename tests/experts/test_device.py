"""Pruning on a GPU: the same result as on the CPU but for rounding, and clear refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moiety.errors import InputError
from moiety.experts import BlockRecovery, Finetune, PruneSettings, prune, prune_many
from moiety.experts.device import check_device, parse_device
from moiety.experts.unpack import dense_view

SETTINGS = PruneSettings(sites="all", context_length=32, windows=12, batch_size=5)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CHOICES: dict[str, dict[str, Any]] = {
    "sparsegpt": {},
    "alps int8": {"method": "alps", "values": "int8"},
    "owl": {"pattern": "0.5", "allocation": "owl"},
    "rounds": {"pattern": "0.4", "schedule": ("0.6",)},
    "towards the model": {"recovery": BlockRecovery(epochs=2)},
    "towards the block": {"recovery": BlockRecovery(epochs=2, target="block")},
}


@pytest.mark.parametrize("name", ["", "tpu", "meta", "gpu", "cuda:x"])
def test_names_of_no_device_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="device must be cpu, cuda or cuda:NUMBER"):
        PruneSettings(device=name)


def test_devices_are_told_by_kind() -> None:
    assert parse_device("cuda:3") == torch.device("cuda", 3)
    check_device("cpu")


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = replace(SETTINGS, device="cuda:2")
    model, texts = world.finetunes["letters"], world.texts["letters"]["calibration"]
    with pytest.raises(InputError, match="device cuda:2 on this machine, but torch sees 2 GPUs"):
        prune(model, tmp_path / "out", texts, settings)
    finetunes = [Finetune(name="letters", model=model, data=texts)]
    with pytest.raises(InputError, match="torch sees 2 GPUs"):
        prune_many(finetunes, tmp_path / "many", settings)
    assert not list(tmp_path.iterdir())


@needs_gpu
@pytest.mark.parametrize("choice", CHOICES)
def test_a_gpu_prunes_as_well_as_the_cpu(world: Any, tmp_path: Path, choice: str) -> None:
    model, texts = world.finetunes["letters"], world.texts["letters"]["calibration"]
    settings = replace(SETTINGS, **CHOICES[choice])
    here = prune(model, tmp_path / "cpu", texts, settings)
    there = prune(model, tmp_path / "cuda", texts, replace(settings, device="cuda"))
    assert list(there.errors) == list(here.errors)
    for step, error in there.errors.items():
        assert error == pytest.approx(here.errors[step], rel=0.1), step
    again = prune(model, tmp_path / "again", texts, replace(settings, device="cuda"))
    for step, error in again.errors.items():
        assert error == pytest.approx(there.errors[step], rel=1e-3), step
    AutoModelForCausalLM.from_pretrained(tmp_path / "cuda")


@needs_gpu
def test_a_gpu_prunes_differences_and_takes_masks_over(world: Any, tmp_path: Path) -> None:
    model, texts = world.finetunes["letters"], world.texts["letters"]["calibration"]
    settings = replace(SETTINGS, device="cuda")
    prune(model, tmp_path / "delta", texts, settings, base=world.base)
    prune(model, tmp_path / "first", texts, settings)
    prune(model, tmp_path / "second", texts, settings, masks=tmp_path / "first")
    first, second = (dense_view(tmp_path / name) for name in ("first", "second"))
    for name in first:
        assert torch.equal(first[name] != 0, second[name] != 0), name
