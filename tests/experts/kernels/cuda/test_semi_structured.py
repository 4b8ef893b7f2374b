"""cuSPARSELt's metadata behind the values: the bookkeeping, with a stand-in for cuSPARSELt itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.experts import kernels
from moiety.experts.kernels.cuda import layout, semi_structured
from moiety.experts.kernels.cuda.forward import most_tokens
from moiety.experts.kernels.cuda.many import ManyTokens
from moiety.experts.kernels.cuda.semi_structured import compressed, with_metadata


def compress(dense: Tensor) -> Tensor:
    """Non-zeros in order, then as much metadata as cuSPARSELt has: here, the mask of 2:4."""
    rows, columns = dense.shape
    kept = dense != 0
    assert bool((kept.view(rows, -1, 4).sum(-1) == 2).all()), "cuSPARSELt would corrupt this"
    bits = (kept.view(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    flat = torch.cat([dense[kept].view(torch.uint8), bits.reshape(-1)])
    return flat.view(dense.dtype).view(rows, columns * 9 // 16)


def multiply(matrix: Tensor, tokens: Tensor, **_: Any) -> Tensor:
    """The product that the stand-in's matrices stand for."""
    rows, columns = len(matrix), matrix.shape[1] * 16 // 9
    flat = matrix.reshape(-1).view(torch.uint8)
    values = flat[: rows * columns].view(matrix.dtype)
    bits = flat[rows * columns :].view(rows, -1, 1) >> torch.arange(8) & 1
    dense = torch.zeros(rows, columns, dtype=matrix.dtype)
    dense[bits.flatten(1).bool()] = values
    return (dense.float() @ tokens.float()).T.to(matrix.dtype)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(semi_structured, "_searched", lambda *_: 3)


def planes_of(packs: Any, kind: str = "bf16") -> tuple[Any, Any, Tensor]:
    _, values, mask, scale = packs.stacked(3, 64, 128, "2:4", kind)
    values[:, ::7] = 0
    stored = kernels.packed(values, mask, 128, scale)
    each = [kernels.dense(stored, one, torch.bfloat16) for one in range(3)]
    return stored, layout.planes(stored), torch.stack(each)


@pytest.mark.usefixtures("stand_in")
def test_metadata_stands_behind_each_matrix_and_values_stay(packs: Any) -> None:
    stored, planes, dense = planes_of(packs)
    both = with_metadata(planes, dense)
    assert torch.equal(both.values, planes.values)
    assert both.values.untyped_storage().nbytes() == 3 * 64 * 128 * 9 // 8
    back = layout.stored(both)
    assert torch.equal(back.values, stored.values)
    assert compressed(planes, 0) is None
    for which in range(3):
        matrix = compressed(both, which)
        assert matrix is not None and matrix.shape == (64, 72)
        marked = dense[which].clone()
        identity = torch.eye(128, dtype=torch.bfloat16)
        assert torch.equal(multiply(matrix, identity.T), marked.T)
    assert most_tokens(both) < most_tokens(planes)


@pytest.mark.usefixtures("stand_in")
def test_many_tokens_are_multiplied_with_it(packs: Any) -> None:
    _, planes, dense = planes_of(packs)
    both = with_metadata(planes, dense)

    def never(*_: object) -> Tensor:
        raise AssertionError("expanded though the metadata is there")

    input = torch.randn(37, 128).bfloat16()
    output = ManyTokens(never).linear(input, both, 1)
    torch.testing.assert_close(output, input @ dense[1].T, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("stand_in")
def test_a_single_matrix_keeps_its_metadata(packs: Any) -> None:
    _, planes, dense = planes_of(packs)
    one = with_metadata(planes.one(1), dense[1:2])
    matrix = compressed(one, 0)
    assert matrix is not None
    identity = torch.eye(128, dtype=torch.bfloat16)
    assert torch.equal(multiply(matrix, identity.T).T != 0, dense[1] != 0)


@pytest.mark.usefixtures("stand_in")
def test_what_does_not_fit_stays_as_it_is(packs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, planes, dense = planes_of(packs)
    monkeypatch.setattr(torch, "_cslt_compress", lambda matrix: compress(matrix).flip(0))
    assert with_metadata(planes, dense) is planes
    _, integers, dense = planes_of(packs, "int8")
    assert with_metadata(integers, dense) is integers


def test_without_cusparselt_nothing_changes(packs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    _, planes, dense = planes_of(packs)
    assert with_metadata(planes, dense) is planes
