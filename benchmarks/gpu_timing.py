"""Timing on a GPU: CUDA graphs of several calls over rotating weights, contenders in turns."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[int], object]
COLD = 3


def copies(nbytes: int) -> int:
    """Copies of so many bytes of weights that a call never finds its own in the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-COLD * cache // nbytes))


def graph(run: Run, turns: int) -> torch.cuda.CUDAGraph:
    """`run(0)`, `run(1)`, ... as one graph, after a warm-up outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for turn in range(2):
            run(turn)
    torch.cuda.current_stream().wait_stream(side)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        for turn in range(turns):
            run(turn)
    return made


def interleaved(contenders: Mapping[str, Run], turns: int = 6, rounds: int = 9) -> dict[str, float]:
    """Median seconds a call of each contender."""
    graphs = {name: graph(run, turns) for name, run in contenders.items()}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, made in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            made.replay()
            end.record()
            end.synchronize()
            if turn > 1:
                found[name].append(start.elapsed_time(end) / 1e3 / turns)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 2 GiB on the device."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda _: target.copy_(source)}, turns=3)["copy"]
    return 2 * source.nbytes / seconds


def card() -> dict[str, Any]:
    """What was measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "triton": _triton(),
    }


def _driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _triton() -> str:
    import triton

    return triton.__version__
