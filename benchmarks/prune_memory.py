"""Peak memory of pruning a model of real shapes, against the bytes of one block and of the whole.

    python -m benchmarks.prune_memory [--json FILE] [--windows 16] [--folder DIR]

Writes a randomly initialised Llama of 1.3 B parameters (24 blocks, 2048 / 5504, bf16) into a
scratch folder, prunes it in a process of its own and reads that process's peak resident memory.
With `--folder` the model stays and a run that was cut goes on; `blocks_resumed` then says how many
blocks the peak does not cover.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.memory import peak
from moiety.experts.shards import write_weights
from moiety.experts.stream import skeleton
from moiety.files import read_json, write_json

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
CONTEXT = 512
MIB = 1 << 20


def random_llama(folder: Path, layers: int) -> dict[str, int]:
    """Write the model and a tokenizer of as many words; gives bytes of a block and of all."""
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    model = skeleton(config)
    sizes = {"block": 0, "model": 0, "parameters": 0}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
            if parameter.ndim == 2:
                tensor = torch.randn(parameter.shape, generator=generator).mul_(0.02).bfloat16()
            sizes["model"] += tensor.nbytes
            sizes["parameters"] += tensor.numel()
            sizes["block"] += tensor.nbytes if ".layers.0." in name else 0
            yield name, tensor

    write_weights(folder, tensors())
    config.save_pretrained(folder)
    words = {f"w{number}": number for number in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return sizes


def write_text(path: Path, windows: int) -> None:
    """Random words, one document a window."""
    generator = torch.Generator().manual_seed(1)
    shape = (windows, CONTEXT + 1)
    rows = torch.randint(SHAPE["vocab_size"], shape, generator=generator).tolist()
    lines = (json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in rows)
    path.write_text("\n".join(lines))


def _prepared(folder: Path, windows: int, layers: int) -> dict[str, int]:
    """Sizes of the model in `folder`, which is made if it is not there, and the text beside it."""
    sizes = folder / f"sizes-{layers}.json"
    if not sizes.is_file():
        (folder / "model").mkdir(parents=True)
        write_text(folder / "text.jsonl", windows)
        write_json(sizes, random_llama(folder / "model", layers))
    return read_json(sizes)


def child(folder: Path, windows: int, refit_steps: int) -> None:
    """Prune and print seconds and peak memory: what the parent process reads."""
    from moiety.experts import PruneSettings, prune

    before = peak()
    start = time.perf_counter()
    settings = PruneSettings(
        sites="all",
        windows=windows,
        context_length=CONTEXT,
        batch_size=4,
        refit_steps=refit_steps,
    )
    report = prune(folder / "model", folder / "pruned", folder / "text.jsonl", settings)
    values = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak(),
        "peak_before_bytes": before,
        "packed_bytes": report.packed_bytes,
        "errors": report.errors,
        "calibration_tokens": report.calibration_tokens,
        "blocks_resumed": report.blocks_resumed,
    }
    print(json.dumps(values))


def measure(
    windows: int, layers: int, refit_steps: int, keep: Path | None = None
) -> dict[str, Any]:
    """Make the model (in `keep`, if given), prune it in a child process, put figures together."""
    with contextlib.ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="moiety-memory-")
        folder = Path(stack.enter_context(scratch)) if keep is None else keep
        sizes = _prepared(folder, windows, layers)
        command = [sys.executable, "-m", "benchmarks.prune_memory", "--child", str(folder)]
        options = ["--windows", str(windows), "--refit-steps", str(refit_steps)]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
    width, block = SHAPE["hidden_size"], 2 * sizes["block"]
    activations = found["calibration_tokens"] * width * 2
    grams = 4 * (3 * width**2 + SHAPE["intermediate_size"] ** 2)
    own = found["peak_bytes"] - found["peak_before_bytes"]
    return {
        **found,
        "parameters": sizes["parameters"],
        "model_bytes": sizes["model"],
        "block_fp32_bytes": block,
        "gram_bytes": grams,
        "activation_bytes": activations,
        "own_peak_bytes": own,
        "own_peak_over_block": (own - activations) / block,
        "own_peak_over_model": own / sizes["model"],
    }


def main() -> None:
    """Measure, print a table, write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--refit-steps", type=int, default=8, help="fewer: the same memory")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="keep the model here; go on if cut")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.windows, arguments.refit_steps)
        return
    found = measure(arguments.windows, arguments.layers, arguments.refit_steps, arguments.folder)
    table = Table("figure", "value", title="peak memory of moiety prune, 2:4 on all linear layers")
    for name, value in found.items():
        shown = f"{value / MIB:,.0f} MiB" if name.endswith("bytes") else str(value)
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else shown)
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"device": "cpu", "threads": torch.get_num_threads(), **found})


if __name__ == "__main__":
    main()
