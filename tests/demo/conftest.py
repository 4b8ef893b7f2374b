"""A demo small enough to train in a second, and the models it makes."""

from pathlib import Path

import pytest

from moiety.demo.models import DemoModels, DemoSize, prepare

TINY = DemoSize(
    name="tiny",
    vocabulary=320,
    hidden=16,
    intermediate=32,
    layers=2,
    heads=2,
    context_length=32,
    train_tokens=6_000,
    calibration_tokens=2_000,
    heldout_tokens=2_000,
    document_characters=2_000,
    problems=20,
    rows=8,
    base_steps=6,
    finetune_steps=3,
    matrix_rate=0.02,
    vector_rate=0.01,
    finetune_share=0.5,
)


@pytest.fixture(scope="session")
def tiny() -> DemoSize:
    return TINY


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def models(tiny: DemoSize, cache: Path) -> DemoModels:
    return prepare(tiny, cache=cache)
