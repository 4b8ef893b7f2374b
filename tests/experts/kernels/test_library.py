"""The compiled CPU kernels through Python: every instruction set and layout, damaged masks."""

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts import kernels
from moiety.experts.kernels import Weights, reference
from moiety.experts.kernels.library import Isa, Library, library
from moiety.experts.kernels.weights import DTYPES, INTEGERS

pytestmark = pytest.mark.usefixtures("compiled", "seeded")
SUPPORTED = [isa for isa in Isa if (found := library()) is not None and isa in found.supported]
ISAS = SUPPORTED or [Isa.PORTABLE]
LAYOUTS = [("2:4", "tiles"), ("2:4", "rows"), ("0.3", "rows")]
TOKENS = (1, 2, 3, 4, 5, 9, 14, 23, 33, 90, 100, 128, 130)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def stack(
    packs: Any, count: int, rows: int, columns: int, pattern: str, kind: str
) -> tuple[Tensor, Weights]:
    """Random matrices, dense in fp64 and packed."""
    _, values, mask, scale = packs.stacked(count, rows, columns, pattern, kind)
    weights = kernels.packed(values, mask, columns, scale)
    scales = [None] * count if scale is None else scale
    triples = zip(values, mask, scales, strict=True)
    dense = [reference.expand(v, m, columns, s).double() for v, m, s in triples]
    return torch.stack(dense), weights


def in_layout(weights: Weights, layout: str) -> Weights:
    if layout == "rows":
        return weights
    tiled = kernels.tiled(weights)
    assert tiled is not None
    return tiled


def assert_near(output: Tensor, expected: Tensor, size: Tensor, error: float = 1e-5) -> None:
    """Within a part of the sum of the sizes of all that was added, and bf16's own rounding."""
    bound = error * size + 1e-30
    if output.dtype == torch.bfloat16:
        bound = bound + expected.abs() / 250
    worst = ((output.double() - expected).abs() / bound).nan_to_num(torch.inf)
    assert worst.numel() == 0 or worst.max() <= 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("stored", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_isa_multiplies_as_the_reference_does(
    packs: Any, compiled: Library, isa: Isa, kind: str, stored: Any, dtype: torch.dtype
) -> None:
    pattern, layout = stored
    shapes = [(17, 36), (70, 260)] if pattern == "2:4" else [(9, 45), (18, 299)]
    # So many tokens are multiplied without AMX.
    few = 5 if layout == "tiles" else 0 if kind == "int4" else 1
    for rows, columns in shapes:
        [exact], weights = stack(packs, 1, rows, columns, pattern, kind)
        weights = in_layout(weights, layout)
        for tokens in (0, *TOKENS):
            dense = exact
            input = torch.randn(tokens, columns).to(dtype)
            output = compiled.forward(input, weights, isa=isa)
            assert output.dtype == dtype
            if isa == Isa.AMX and kind in INTEGERS and dtype == torch.bfloat16 and tokens > few:
                dense = exact.bfloat16().double()  # AMX rounds codes times their scale
            wide = input.double()
            assert_near(output, wide @ dense.T, wide.abs() @ dense.abs().T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("pattern", "layout"), LAYOUTS)
def test_every_isa_routes_as_the_reference_does(
    packs: Any, compiled: Library, isa: Isa, kind: str, pattern: str, layout: str
) -> None:
    down, down_weights = stack(packs, 3, 20, 36, pattern, kind)
    up, up_weights = stack(packs, 3, 72, 20, pattern, kind)
    down_weights = in_layout(down_weights, layout)
    up_weights = up_weights.regrouped(2 * up_weights.stack) if layout == "tiles" else up_weights
    up_weights = in_layout(up_weights, layout)
    for tokens in TOKENS:
        experts, weights = torch.randint(-1, 4, (tokens, 2)), torch.rand(tokens, 2)
        base = torch.randn(tokens, 20)
        input = torch.randn(tokens, 36)
        routes = {"experts_TA": experts, "weights_TA": weights, "isa": isa}
        output = compiled.forward(input, down_weights, base_TO=base, **routes)
        arguments = (lambda one: down[one], 3, 20, experts, weights.double(), base.double())
        expected = reference.sparse_routed_linear(input.double(), *arguments)
        torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-4)
        for activation in reference.ACTIVATIONS:
            input = torch.randn(tokens, 20)
            output = compiled.forward(
                input, down_weights, gate_up=up_weights, activation=activation, **routes
            )
            matrices = (lambda one: up[one], lambda one: down[one], 3)
            expected = reference.sparse_experts(
                input.double(), *matrices, experts, weights.double(), activation
            )
            torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (16, 32), (17, 36), (70, 260)])
def test_tiles_give_back_every_bit(packs: Any, kind: str, rows: int, columns: int) -> None:
    dense, stored = stack(packs, 3, rows, columns, "2:4", kind)
    again = kernels.untiled(in_layout(stored, "tiles"))
    assert again[3:] == stored[3:]
    for ours, theirs in zip(again[:3], stored[:3], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or torch.equal(ours, theirs)
    for weights in (stored, in_layout(stored, "tiles")):
        for dtype in (torch.float32, torch.bfloat16):
            for which, expected in enumerate(dense):
                assert torch.equal(kernels.dense(weights, which, dtype), expected.to(dtype))


@pytest.mark.parametrize("layout", ["tiles", "rows"])
def test_memory_may_be_strided(packs: Any, layout: str) -> None:
    [dense], weights = stack(packs, 1, 17, 36, "2:4", "fp32")
    assert weights.mask is not None
    mask = weights.mask.repeat_interleave(2, -1)[..., ::2]
    values = weights.values.mT.contiguous().mT
    strided = weights._replace(mask=mask, values=values)
    assert not mask.is_contiguous() and not values.is_contiguous()
    weights = in_layout(strided, layout)
    inputs = [
        torch.randn(36, 5).T,
        torch.randn(5, 72)[:, ::2],
        torch.randn(1, 36).expand(5, 36),
        torch.randn(3, 36, 2).transpose(1, 2),
        torch.randn(5, 50)[:, 7:43],
    ]
    for input in inputs:
        expected = (input.double() @ dense.T).float()
        torch.testing.assert_close(kernels.sparse_linear(input, weights), expected)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize(("pattern", "layout"), LAYOUTS)
def test_any_number_of_threads_gives_the_same_bits(
    packs: Any, threads: Callable[[int], None], kind: str, pattern: str, layout: str
) -> None:
    _, down = stack(packs, 3, 84, 132, pattern, kind)
    _, up = stack(packs, 3, 264, 84, pattern, kind)
    up = up.regrouped(2 * up.stack) if layout == "tiles" else up
    down, up = in_layout(down, layout), in_layout(up, layout)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            input, wide = (torch.randn(tokens, n).to(dtype) for n in (132, 84))
            routes = torch.randint(3, (tokens, 2)), torch.rand(tokens, 2)
            outputs = []
            for count in (1, 2, 3, 3):
                threads(count)
                outputs.append(
                    (
                        kernels.sparse_linear(input, Weights(*map(_first, down))),
                        kernels.sparse_routed_linear(input, down, *routes),
                        kernels.sparse_experts(wide, up, down, *routes),
                    )
                )
            for others in outputs[1:]:
                pairs = zip(outputs[0], others, strict=True)
                assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_a_matrix_without_columns_gives_zeros(compiled: Library, isa: Isa, layout: str) -> None:
    values, mask = torch.empty(1, 70, 0).bfloat16(), torch.empty(1, 70, 0, dtype=torch.uint8)
    weights = in_layout(kernels.packed(values, mask, 0), layout)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 23, 115, 330):
            output = compiled.forward(torch.empty(tokens, 0, dtype=dtype), weights, isa=isa)
            assert torch.equal(output, torch.zeros(tokens, 70, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("pattern", "layout"), LAYOUTS)
def test_many_tokens_do_not_depend_on_threads(
    packs: Any,
    compiled: Library,
    threads: Callable[[int], None],
    isa: Isa,
    pattern: str,
    layout: str,
) -> None:
    """Some of these are cut by tokens with few threads and by rows with more."""
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "int4")):
        weights = in_layout(stack(packs, 1, 70, 1100, pattern, kind)[1], layout)
        for tokens in (170, 330, 520, 650):
            input = torch.randn(tokens, 1100).to(dtype)
            outputs = []
            for count in (1, 2, 3, 4):
                threads(count)
                outputs.append(compiled.forward(input, weights, isa=isa))
            assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def _first(field: Any) -> Any:
    return field[:1] if isinstance(field, Tensor) else field


RUNTIMES = """
import re, sys, types, torch
from pathlib import Path

# The kernels alone: all that the package around them imports takes most of the time.
sys.modules["moiety.experts"] = package = types.ModuleType("moiety.experts")
package.__path__ = [sys.argv[1]]
from moiety.experts import kernels

def loaded():
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"/\\S*/_cpu\\.so", maps)), set(re.findall(r"/\\S*lib[gi]?omp5?[-.]\\S*", maps))

mask = torch.full((4, 1), 0x33, dtype=torch.uint8)
stored = kernels.packed(torch.ones(4, 4), mask, 8)
none, before = loaded()
assert kernels.sparse_linear(torch.ones(3, 8), kernels.tiled(stored)).eq(4).all()
ours, after = loaded()
assert not none and len(ours) == 1 and before and after == before, (none, ours, before, after)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_the_kernels_bring_no_openmp_runtime_besides_torchs() -> None:
    """Other packages may have brought theirs (sentencepiece does)."""
    command = [sys.executable, "-c", RUNTIMES, str(Path(kernels.__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "0.3"])
@pytest.mark.parametrize(("first", "end", "byte"), [(0, 2, 255), (0, 2, 0), (4, 5, 0xF5)])
def test_a_damaged_mask_is_refused(
    packs: Any, kind: str, pattern: str, first: int, end: int, byte: int
) -> None:
    _, weights = stack(packs, 1, 9, 36, pattern, kind)
    assert weights.mask is not None
    weights.mask[0, 4, first:end] = byte
    for tokens in (1, 40):
        with pytest.raises(InputError, match="damaged"):
            kernels.sparse_linear(torch.randn(tokens, 36), weights)
    with pytest.raises(InputError, match="damaged"):
        kernels.dense(weights, 0, torch.float32)
    if pattern == "2:4":
        with pytest.raises(InputError, match="damaged"):
            kernels.tiled(weights)


def test_tiles_need_two_of_every_four(packs: Any) -> None:
    _, weights = stack(packs, 1, 9, 36, "2:4", "fp32")
    assert weights.mask is not None
    weights.mask[0, 8, 0] = 0x17
    assert kernels.sparse_linear(torch.randn(3, 36), weights).isfinite().all()
    with pytest.raises(InputError, match="damaged"):
        kernels.tiled(weights)
    for pattern in ("1:4", "0.3", "dense"):
        assert kernels.tiled(stack(packs, 1, 9, 36, pattern, "fp32")[1]) is None


def test_a_cpu_without_the_instructions_is_named(packs: Any, compiled: Library) -> None:
    _, weights = stack(packs, 1, 9, 36, "2:4", "fp32")
    old = Library()
    old.supported, old.best = (Isa.PORTABLE,), Isa.PORTABLE
    with pytest.raises(InputError, match="expected a CPU with AVX2, but it has PORTABLE at best"):
        old.forward(torch.randn(1, 36), weights, isa=Isa.AVX2)
    assert old.forward(torch.randn(1, 36), weights).isfinite().all()
    assert compiled.supported[0] == Isa.PORTABLE and compiled.best in compiled.supported
    assert kernels.description() == f"compiled kernels, {compiled.best.name.replace('_', '-')}"


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_in_either_layout(packs: Any, kind: str, dtype: torch.dtype) -> None:
    _, down = stack(packs, 3, 20, 36, "2:4", kind)
    _, up = stack(packs, 3, 72, 20, "2:4", kind)
    input, narrow = (torch.randn(9, n, dtype=dtype, requires_grad=True) for n in (36, 20))
    experts, weights = torch.randint(-1, 4, (9, 2)), torch.rand(9, 2, requires_grad=True)
    gradient = torch.randn(9, 20).to(dtype)
    both = []
    for layout in ("rows", "tiles"):
        below = in_layout(down, layout)
        above = in_layout(up.regrouped(2 * up.stack) if layout == "tiles" else up, layout)
        one = Weights(*map(_first, below))
        calls = [
            (kernels.sparse_linear(input, one), [input]),
            (kernels.sparse_routed_linear(input, below, experts, weights), [input, weights]),
            (kernels.sparse_experts(narrow, above, below, experts, weights), [narrow, weights]),
        ]
        both.append(
            [g for out, leaves in calls for g in torch.autograd.grad(out, leaves, gradient)]
        )
    for rows, tiles in zip(*both, strict=True):
        assert torch.equal(rows, tiles)
