"""Open models in a process of its own, fill their caches, and print what that took of memory.

`python resident.py CONTEXT MODEL...` prints JSON: for each MODEL the bytes held with its cache full
and at the peak, beyond what the process held after it had run each of them once.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import moiety.experts.quantizer  # noqa: F401

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MAPS = Path("/proc/self/maps")
RESET_PEAK, DONT_NEED = "5", 4
SMALL = 2**18


def held(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def opened(folder: str) -> Any:
    """The model with the pages of its weights in memory, and no other of its files.

    Small tensors are copied: the system maps a file in pieces that are larger than a norm.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():
        if parameter.nbytes < SMALL:
            parameter.data = parameter.data.clone()
    drop_file_pages()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.view(torch.uint8).max() if tensor.dim() else tensor
    return model


def drop_file_pages() -> None:
    """Give back pages of weight files: those read only to be converted are not needed again."""
    library = ctypes.CDLL(None, use_errno=True)
    for line in MAPS.read_text().splitlines():
        if line.endswith(".safetensors"):
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DONT_NEED)


@torch.no_grad()
def measure(folder: str, context: int) -> dict[str, int]:
    gc.collect()
    REFERENCES.write_text(RESET_PEAK)
    before = held("VmRSS")
    model = opened(folder)
    output = model(input_ids=torch.full((1, context), 3), use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    del output
    told = {"filled": held("VmRSS") - before, "peak": held("VmHWM") - before}
    del model, cache
    return told


if __name__ == "__main__":
    context, folders = int(sys.argv[1]), sys.argv[2:]
    for folder in folders:
        measure(folder, context)
    found = [measure(folder, context) for folder in folders]
    sys.stdout.write(json.dumps(found))
