"""Preparing the demo: ordinary checkpoints, kept by content, the same bytes every time."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from moiety.demo import models as demo
from moiety.demo.models import DOMAINS, DemoModels, DemoSize, default_cache, prepare
from moiety.demo.muon import orthogonal
from moiety.demo.train import rate_share, seeded_batches
from moiety.files import digest_of_folder
from moiety.progress import Silent

Item = TypeVar("Item")


class Recorder(Silent):
    def __init__(self) -> None:
        self.tracked: list[tuple[str, int | None]] = []
        self.notes: list[str] = []

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        self.tracked.append((description, total))
        yield from items

    def note(self, message: str) -> None:
        self.notes.append(message)


def _tensors(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_are_ordinary(models: DemoModels, dtype: torch.dtype) -> None:
    for folder in (models.base, *models.finetunes.values()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert model.dtype == dtype
        assert model.config.model_type == "llama"
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
        assert GenerationConfig.from_pretrained(folder).eos_token_id == 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_finetunes_move_all_but_embeddings(models: DemoModels, domain: str) -> None:
    base, finetune = _tensors(models.base), _tensors(models.finetunes[domain])
    assert base.keys() == finetune.keys()
    for name, tensor in base.items():
        frozen = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(tensor, finetune[name]) == frozen, name


def test_second_time_does_no_work(
    models: DemoModels, tiny: DemoSize, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **named: object) -> None:
        raise AssertionError(f"expected no work, but {named} was made again")

    for name in ("write_corpora", "train_tokenizer", "train_base", "train_finetune"):
        monkeypatch.setattr(demo, name, worked)
    assert prepare(tiny, cache=cache) == models


def test_fresh_gives_the_same_bytes(models: DemoModels, tiny: DemoSize, cache: Path) -> None:
    folders = [models.corpora, models.base, *models.finetunes.values()]
    before = [(digest_of_folder(folder), folder.stat().st_mtime_ns) for folder in folders]
    assert prepare(tiny, cache=cache, fresh=True) == models
    after = [(digest_of_folder(folder), folder.stat().st_mtime_ns) for folder in folders]
    assert [digest for digest, _ in before] == [digest for digest, _ in after]
    assert all(old[1] != new[1] for old, new in zip(before, after, strict=True))
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_an_interrupted_preparation_goes_on(
    models: DemoModels,
    tiny: DemoSize,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    cpp = copy / models.finetunes["cpp"].name
    shutil.rmtree(cpp)
    (copy / f".{cpp.name}.killed").mkdir()
    train = demo.train_finetune

    def interrupted(folder: Path, *rest: object, **named: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_finetune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny, cache=copy)
    assert not cpp.exists()

    monkeypatch.setattr(demo, "train_finetune", train)
    recorder = Recorder()
    prepare(tiny, cache=copy, progress=recorder)
    assert recorder.tracked == [("train cpp", tiny.finetune_steps)]
    assert "cpp: loss" in recorder.notes[-1]
    assert digest_of_folder(cpp) == digest_of_folder(models.finetunes["cpp"])


def test_finetune_settings_leave_the_base_alone(
    models: DemoModels, tiny: DemoSize, cache: Path
) -> None:
    other = prepare(replace(tiny, finetune_steps=1), cache=cache)
    assert other.base == models.base
    assert set(other.finetunes.values()).isdisjoint(models.finetunes.values())


def test_cache_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "moiety" / "demo"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache() == Path.home() / ".cache" / "moiety" / "demo"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 8)])
def test_orthogonal_updates(shape: tuple[int, int]) -> None:
    matrix_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix_OI, iterations=8))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_rates_rise_and_fall() -> None:
    shares = [rate_share(step, steps=100) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == 1
    assert shares[100] == 0


def test_batches_share_every_corpus() -> None:
    windows = [torch.full((5, 3), number) for number in range(4)]
    batches = list(seeded_batches(windows, rows=8, steps=4, seed=0))
    assert len(batches) == 4
    assert all(batch[:, 0].bincount().tolist() == [2, 2, 2, 2] for batch in batches)
