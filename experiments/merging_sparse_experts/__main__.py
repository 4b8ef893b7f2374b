"""What happens to quality and to sparsity when sparse experts are merged.

    moiety demo
    python -m experiments.merging_sparse_experts moiety-demo/recipe.yaml --out FILE

Each cell merges the recipe's finetunes by one method in one order of pruning and merging, with
the coefficient that its calibration text prefers, and measures the result on held-out text.
Cells already in the file are kept.
"""

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

from experiments.merging_sparse_experts.run import (
    HELD_OUT_WINDOWS,
    Lab,
    cells,
    controls,
    key_of,
    measured_how,
)
from experiments.merging_sparse_experts.tables import tables
from experiments.results import started
from moiety.compose import Recipe
from moiety.console import ConsoleProgress
from moiety.files import write_json


def main() -> None:
    """Measure what is missing, write it down after every cell, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="only cells whose key holds one of these, comma-separated")
    parser.add_argument(
        "--work", type=Path, help="where pruned models are kept (default: OUT.work)"
    )
    parser.add_argument("--held-out", type=int, default=HELD_OUT_WINDOWS, help="windows a domain")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    progress = ConsoleProgress()
    work = arguments.work or arguments.out.with_name(f"{arguments.out.name}.work")
    lab = Lab(Recipe.read(arguments.recipe), work, arguments.held_out, progress)
    results = started(arguments.out, measured_how(lab), lambda: controls(lab))
    texts = arguments.only.split(",") if arguments.only else [""]
    wanted = [cell for cell in cells() if any(text in key_of(cell) for text in texts)]
    wanted = [cell for cell in wanted if key_of(cell) not in results["cells"]]
    for cell in progress.track(wanted, "cells", len(wanted)):
        results["cells"][key_of(cell)] = lab.run(cell)
        write_json(arguments.out, results)
    sys.stdout.write(f"{tables(results)}\n")


if __name__ == "__main__":
    main()
