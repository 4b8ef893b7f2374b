"""The kernels compiled for real GPUs without one: no spills, tensor cores, few integer operations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = Path(__file__).with_name("compile_offline.py")
# (Values' bits, gated, rows, tokens, warps, warps that share columns, loads in flight).
SHAPES = [
    [16, True, 32, 8, 4, 2, 3],
    [16, False, 64, 64, 4, 1, 3],
    [8, True, 32, 8, 4, 2, 3],
    [4, True, 32, 8, 2, 1, 3],
]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_compiled_kernels_keep_everything_in_registers(capability: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILER), str(capability), json.dumps(SHAPES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for (bits, _, rows, tokens, warps, sharing, _), kernel in zip(SHAPES, found, strict=True):
        count = kernel["instructions"]
        groups = sharing * rows * 64 // (32 * warps)
        assert kernel["stack"] <= 16 and kernel["registers"] <= 255
        assert kernel["converts"] <= 1, "words must be expanded where they are multiplied"
        assert count["HMMA"] == groups // 2 * tokens // 8
        integer = sum(count.get(name, 0) for name in ("PRMT", "LOP3", "SHF", "SEL", "IADD3"))
        assert 5 * groups <= count["PRMT"] <= 6 * groups
        assert integer <= {16: 10, 8: 13, 4: 11}[bits] * groups
