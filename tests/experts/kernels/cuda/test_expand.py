"""The PTX of the expansion, emulated, against what it should give."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.experts.kernels.cuda import expand

PATTERNS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
CASES = [("float", "bf16"), *((kind, dtype) for kind in ("int8", "int4") for dtype in expand.ONES)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def emulator() -> Any:
    path = Path(__file__).with_name("emulator.py")
    spec = importlib.util.spec_from_file_location("emulator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF


def stored(kind: str, values: list[tuple[int, int]]) -> list[int]:
    """Eight groups' values as the words of the layout."""
    if kind == "float":
        return [first | second << 16 for first, second in values]
    if kind == "int8":
        signed = [abs(v) | (128 if v < 0 else 0) for pair in values for v in pair]
        return [int.from_bytes(bytes(signed[4 * q : 4 * q + 4]), "little") for q in range(4)]
    both = [(first + 8) | (second + 8) << 4 for first, second in values]
    return [int.from_bytes(bytes(both[4 * q : 4 * q + 4]), "little") for q in range(2)]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_assembly_puts_every_value_in_its_column(kind: str, dtype: str) -> None:
    emulated = emulator()
    text = expand.float_assembly() if kind == "float" else None
    text = text or getattr(expand, f"{kind}_assembly")(dtype)
    limit = {"float": 65535, "int8": 127, "int4": 7}[kind]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        numbers = torch.randint(6, (8,), generator=generator).tolist()
        low = 0 if kind == "float" else -limit
        drawn = torch.randint(low, limit + 1, (8, 2), generator=generator).tolist()
        codes = sum(number << 4 * plane for plane, number in enumerate(numbers))
        output = emulated.run(text, [codes, *stored(kind, [(a, b) for a, b in drawn])])
        for plane, number in enumerate(numbers):
            columns = [0, 0, 0, 0]
            for column, value in zip(PATTERNS[number], drawn[plane], strict=True):
                columns[column] = value if kind == "float" else bits(value, DTYPES[dtype])
            words = [columns[0] | columns[1] << 16, columns[2] | columns[3] << 16]
            assert [output[plane], output[8 + plane]] == words
