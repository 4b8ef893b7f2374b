"""The random packed matrices of `packs.py`, as a fixture."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def packs() -> ModuleType:
    """The module `packs.py`."""
    spec = importlib.util.spec_from_file_location("packs", Path(__file__).with_name("packs.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
