"""`python -m benchmarks [--quick] [--json FOLDER]`: the sparse kernels against their peers.

One matrix, a routed block, and a whole model; the tables say which targets are met. Pruning's
benchmarks run on their own: `python -m benchmarks.pruning`, `python -m benchmarks.prune_memory`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = ("linear", "moe_block", "decode")


def main() -> None:
    """Each script in a process of its own, so that none inherits another's memory."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write each script's rows to this folder")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    arguments = parser.parse_args()
    for script in SCRIPTS:
        command = [sys.executable, "-m", f"benchmarks.{script}"]
        if arguments.quick:
            command.append("--quick")
        if arguments.json:
            arguments.json.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(arguments.json / f"{script}.json")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
