"""The kernels' own test program under sanitizers.

With SIMDe (Debian: libsimde-dev) every instruction set's code is run, as `make emulate` does, else
this CPU's, as `make sanitize` does. Both `make` targets run more sizes.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cpp"
CHECKS = {
    "sanitized": "#include <stddef.h>",
    "emulated": "#define SIMDE_ENABLE_NATIVE_ALIASES\n#include <simde/x86/avx512.h>",
}


def builds(program: str, folder: Path) -> bool:
    """Whether g++ makes a sanitized program of this here."""
    source = folder / "probe.cpp"
    source.write_text(f"{program}\nint main() {{ return 0; }}\n")
    flags = ["-fsanitize=address,undefined", "-fopenmp"]
    command = ["g++", *flags, str(source), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(platform.system() != "Linux", reason="the kernels are built on Linux only")
def test_the_kernels_compute_what_plain_loops_do(tmp_path: Path) -> None:
    for tool in ("make", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if not builds(CHECKS["sanitized"], tmp_path):
        pytest.skip("needs a g++ with sanitizers and OpenMP (libasan, libubsan, libgomp)")
    build = "emulated" if builds(CHECKS["emulated"], tmp_path) else "sanitized"
    options = ["CXX=g++", "LEVEL=-O0", "ARGS=--quick", f"BUILD={tmp_path}"]
    command = ["make", "-j2", "-C", str(FOLDER), build, *options]
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "int4 gated" in done.stdout and "FAILED" not in done.stdout
