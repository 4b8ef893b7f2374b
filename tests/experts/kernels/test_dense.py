"""Dense matrices with few tokens: the product, its registration, and when it takes over."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from moiety.errors import InputError
from moiety.experts import kernels
from moiety.experts.kernels import crossover
from moiety.experts.kernels.library import Isa, library

DTYPES = (torch.float32, torch.bfloat16)
FOUND = library()
ISAS = [] if FOUND is None else [isa for isa in FOUND.supported if isa != Isa.PORTABLE]
compiled_only = pytest.mark.skipif(not ISAS, reason="no compiled kernels for dense matrices")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@compiled_only
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 45), (70, 64), (131, 299)])
def test_every_isa_multiplies_as_torch_does(isa: Isa, dtype: torch.dtype, shape: tuple) -> None:
    assert FOUND is not None
    rows, columns = shape
    # What lies behind the last value of a row, or of the matrix, must not be multiplied.
    room = torch.full((rows * columns + 64,), torch.nan, dtype=dtype)
    weight = room[: rows * columns].view(shape).copy_(torch.randn(shape))
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 70):
        for input_dtype in DTYPES:
            input = torch.randn(tokens, columns).to(input_dtype)
            results = [FOUND.dense_linear(input, weight, isa=isa, threads=n) for n in (1, 2, 3)]
            expected = input.double() @ weight.double().T
            error = (results[0].double() - expected).abs()
            size = input.double().abs() @ weight.double().abs().T
            rounding = expected.abs() / 250 if input_dtype == torch.bfloat16 else 0
            assert results[0].dtype == input_dtype
            assert (error <= 1e-6 * size + rounding).all()
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@compiled_only
def test_without_avx2_there_is_none() -> None:
    assert FOUND is not None
    with pytest.raises(InputError, match="AVX2"):
        FOUND.dense_linear(torch.randn(1, 4), torch.randn(4, 4), isa=Isa.PORTABLE)
    for weight in (torch.randn(4, 5), torch.randn(4, 4).half()):
        with pytest.raises(InputError, match="bf16 or fp32"):
            FOUND.dense_linear(torch.randn(1, 4), weight)


@pytest.fixture
def small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any size are multiplied here."""
    monkeypatch.setattr(crossover, "SMALLEST_DENSE", 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_the_op_gives_torchs_product_and_gradients(
    small_too: None, dtype: torch.dtype, tokens: int
) -> None:
    weight = torch.randn(24, 40).to(dtype).requires_grad_()
    input = torch.randn(2, tokens, 40).to(dtype).requires_grad_()
    ours, theirs = kernels.dense_linear(input, weight), functional.linear(input, weight)
    error: Any = (
        {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    )
    torch.testing.assert_close(ours, theirs, **error)
    factors = torch.randn_like(theirs)
    gradients = (
        torch.autograd.grad((out * factors).sum(), (input, weight)) for out in (ours, theirs)
    )
    torch.testing.assert_close(*gradients, **error)


def test_the_op_is_registered_properly(small_too: None) -> None:
    weight, input = torch.randn(8, 12, requires_grad=True), torch.randn(3, 12, requires_grad=True)
    torch.library.opcheck(torch.ops.moiety.dense_linear.default, (input, weight))
    compiled = torch.compile(kernels.dense_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, weight), functional.linear(input, weight))


def test_wrong_widths_and_dtypes_are_refused(small_too: None) -> None:
    weight = torch.randn(8, 12)
    with pytest.raises(ValueError, match="width 12"):
        kernels.dense_linear(torch.randn(3, 11), weight)
    with pytest.raises(ValueError, match="the input's dtype"):
        kernels.dense_linear(torch.randn(3, 12), weight.bfloat16())
    for input in (torch.randn(3, 11), torch.randn(3, 12).bfloat16(), torch.randn(2, 3, 12)):
        with pytest.raises(ValueError, match="one dtype"):
            torch.ops.moiety.dense_linear(input, weight)


@compiled_only
def test_only_few_tokens_of_large_plain_matrices_are_read_here() -> None:
    large = torch.randn(2048, 512)
    assert kernels.reads_faster(torch.randn(1, 1, 512), large)
    assert not kernels.reads_faster(torch.randn(1, 500, 512), large)
    assert not kernels.reads_faster(torch.randn(0, 512), large)
    assert not kernels.reads_faster(torch.randn(1, 512), large[:8])
    assert not kernels.reads_faster(torch.randn(1, 2048), large.T)
    assert not kernels.reads_faster(torch.randn(1, 512).double(), large.double())
    assert not kernels.reads_faster(torch.randn(1, 512, device="meta"), large.to("meta"))
