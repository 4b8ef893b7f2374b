"""Compiles the product for a GPU that need not be there and prints what became of it as JSON."""

# Triton's own language and its launches are no Python to a type checker.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moiety.experts.kernels.cuda.product import product

POINTERS = {
    "input": "*bf16",
    "values": "*i32",
    "codes": "*i32",
    "scale": "*i32",
    "token_of_row": "*i32",
    "block_expert": "*i32",
    "block_start": "*i32",
    "block_end": "*i32",
}
ALIGNED = ("rows", "width", "value_words", "value_step", "code_words", "scale_words")


def compiled(capability: int, shape: list[Any]) -> Any:
    """One variant of the kernel for 4096 columns."""
    bits, gated, rows, tokens, warps, sharing, stages = shape
    constants = {
        "KIND": bits,
        "GATED": gated,
        "ACTIVATION": "silu" if gated else "",
        "MODE": "planned",
        "ACTIVE": 1,
        "GATHER": gated,
        "EVEN": True,
        "BN": rows,
        "BM": tokens,
        "WARPS": warps,
        "KS": sharing,
        "SPLITS": 0 if gated else 1,
        "EACH": 16 // sharing,
        "PTX": True,
        "STAGES": stages,
    }
    pointers = {**POINTERS, "output": "*bf16" if gated else "*fp32"}
    names = product.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    even = [place for place, name in enumerate(names) if name in pointers or name in ALIGNED]
    source = ASTSource(
        product,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(place,): [["tt.divisibility", 16]] for place in even},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def described(kernel: Any) -> dict[str, Any]:
    """Registers, stack and instructions of the machine code; layout conversions before it."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
        lines = dump("--dump-sass")
    assert usage is not None
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", lines, re.MULTILINE)
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "instructions": collections.Counter(found),
        "converts": kernel.asm["ttgir"].count("convert_layout"),
    }


if __name__ == "__main__":
    shapes = json.loads(sys.argv[2])
    result = [described(compiled(int(sys.argv[1]), shape)) for shape in shapes]
    sys.stdout.write(json.dumps(result) + "\n")
