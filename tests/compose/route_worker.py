"""Routes copies of one composite under torchrun: `route_worker.py ARGUMENTS.json`."""

import json
import sys
from pathlib import Path

import torch

from moiety.compose import route
from moiety.compose.recipe import Route


def main(arguments: Path) -> None:
    """Learn the gates of every folder, what it holds spread over the processes as it says."""
    torch.set_num_threads(1)
    given = json.loads(arguments.read_text())
    for folder, spread in given["folders"].items():
        settings = Route(**given["route"])
        route(folder, given["data"], settings, spread=spread, **given["text"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
