"""What the tests of the compiled CPU kernels share."""

import platform
import shutil

import pytest
import torch

from moiety.experts.kernels.library import Library, library

COMPILERS = ("g++", "c++", "clang++")


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compiled() -> Library:
    """The library, which has to be there where a compiler is."""
    found = library()
    if found is None and not (platform.system() == "Linux" and any(map(shutil.which, COMPILERS))):
        pytest.skip("no compiled kernels and no compiler to build them")
    assert found is not None
    return found
