"""A few PTX instructions in Python, enough for the expansion of packed groups.

`run` takes the text of one inline assembly and its inputs as words, and gives the output words.
"""

import re
from collections.abc import Callable

import numpy as np
import torch

OUTPUTS = 16


def run(assembly: str, inputs: list[int]) -> list[int]:
    """The sixteen output words for input operands 16 and up."""
    words = {f"${OUTPUTS + place}": word for place, word in enumerate(inputs)}
    body = re.sub(r"^\{\.reg [^;]*;|\}$", "", assembly)
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, operands = line.split(" ", 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [words[source] if source in words else int(source, 0) for source in sources]
        words[target] = INSTRUCTIONS[name](*values) & 0xFFFFFFFF
    return [words[f"${place}"] for place in range(OUTPUTS)]


def prmt(low: int, high: int, selectors: int) -> int:
    """Four bytes out of eight; bit 3 of a selector repeats the byte's sign instead."""
    source = low | high << 32
    result = 0
    for place in range(4):
        selector = selectors >> 4 * place & 15
        byte = source >> 8 * (selector & 7) & 255
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * place
    return result


def lop3(first: int, second: int, third: int, table: int) -> int:
    """Any function of three bits, as its truth table."""
    result = 0
    for place in range(8):
        if table >> place & 1:
            a = first if place & 4 else ~first
            b = second if place & 2 else ~second
            result |= a & b & (third if place & 1 else ~third)
    return result


def fma(dtype: torch.dtype) -> Callable[[int, int, int], int]:
    """Two 16-bit multiply-adds at once; exact wherever the result fits the type."""

    def halves(word: int) -> torch.Tensor:
        bits = np.array([word], dtype=np.uint32).view(np.int16)
        return torch.from_numpy(bits.copy()).view(dtype).double()

    def compute(first: int, second: int, third: int) -> int:
        result = (halves(first) * halves(second) + halves(third)).to(dtype)
        return int(result.view(torch.int16).numpy().view(np.uint32)[0])

    return compute


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "mov.b32": lambda value: value,
    "and.b32": lambda first, second: first & second,
    "shr.b32": lambda value, places: value >> places,
    "shr.u32": lambda value, places: value >> places,
    "fma.rn.bf16x2": fma(torch.bfloat16),
    "fma.rn.f16x2": fma(torch.float16),
}
