"""`python -m benchmarks.decode [--quick] [--json FILE]`: a whole mixture, dense against 2:4.

A Mixtral of 1.5 billion random parameters as transformers holds it (bf16, as mergekit-moe would
write it, and the same in fp32) against the same weights 2:4 through moiety: experts only, and
experts and attention. Prefill of 512 tokens in all and decode of 64 steps, batch 1 and 8, timed in
turns in one process; load time and peak memory each in a process of its own. `--models FOLDER` keeps
the models for later runs, which may then measure a part each: `--only`, `--batches`, `--variants`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks import tables
from benchmarks.matrices import random_weights
from benchmarks.memory import peak, resident
from moiety.experts import kernels
from moiety.experts.architecture import Architecture
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights
from moiety.files import read_json, write_json

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
QUICK: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
}
BATCHES, PREFILL, DECODE = (1, 8), 512, 64
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Folder, dtype of everything that is not packed.
VARIANTS: dict[str, tuple[str, torch.dtype]] = {
    "transformers_bf16": ("dense", torch.bfloat16),
    "transformers_fp32": ("dense", torch.float32),
    "2:4 experts, bf16": ("experts", torch.bfloat16),
    "2:4 experts, fp32": ("experts", torch.float32),
    "2:4 all, bf16": ("all", torch.bfloat16),
    "2:4 all, fp32": ("all", torch.float32),
}
PEERS = ("transformers_bf16", "transformers_fp32")
TARGETS = {"avx512_bf16": {1: 2.2, 8: 2.1}}


def write_models(folder: Path, config: MixtralConfig) -> int:
    """Three folders with the same random weights: dense, experts packed, all packed."""
    layers = range(config.num_hidden_layers)
    experts = [f"model.layers.{layer}.mlp.experts" for layer in layers]
    attention = [f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in ATTENTION]
    packed = {"dense": [], "experts": experts, "all": [*experts, *attention]}
    parameters = 0
    for name, modules in packed.items():
        (folder / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        written = write_weights(folder / name, _tensors(config, [*experts, *attention], modules))
        parameters = parameters or written // 2
        config.save_pretrained(folder / name)
        if modules:
            described = json.loads((folder / name / "config.json").read_text())
            described["quantization_config"] = PackedConfig(
                pattern="2:4", modules=modules, values="bf16"
            ).to_dict()
            (folder / name / "config.json").write_text(json.dumps(described))
    return parameters


def _tensors(
    config: MixtralConfig, sparse: list[str], packed: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint; the same random numbers whatever is packed."""
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    architecture = Architecture(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for module in sparse:
        for name in architecture.matrices(module):
            weights = random_weights(1, *_shape(name, config), "bf16")
            if module in packed:
                assert weights.mask is not None
                yield name, weights.values[0]
                yield f"{name}_mask", weights.mask[0]
            else:
                yield name, kernels.dense(weights, 0, torch.bfloat16)
    inside = tuple(f"{module}." for module in sparse)
    for name, shape in shapes.items():
        if not name.startswith(inside):
            scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * scale
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), tensor.bfloat16()


def _shape(name: str, config: MixtralConfig) -> tuple[int, int]:
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width // config.num_attention_heads * config.num_key_value_heads
    ends = {"w1": (inner, width), "w3": (inner, width), "w2": (width, inner)}
    ends |= {"k_proj": (narrow, width), "v_proj": (narrow, width)}
    return ends.get(name.split(".")[-2], (width, width))


def opened(folder: Path, variant: str) -> PreTrainedModel:
    """One variant, ready."""
    name, dtype = VARIANTS[variant]
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype).eval()


@torch.inference_mode()
def timed(model: PreTrainedModel, ids: Tensor, decode: int) -> tuple[float, float]:
    """Seconds of the prefill, and of `decode` greedy steps after it."""
    start = time.perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for _ in range(decode):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return middle - start, time.perf_counter() - middle


def child(folder: Path, variant: str) -> None:
    """Open one variant and run it once; print load time and peak memory."""
    start = time.perf_counter()
    model = opened(folder, variant)
    loaded = time.perf_counter() - start
    timed(model, torch.arange(32)[None], 4)
    values = {"load_seconds": loaded, "peak_bytes": peak(), "resident_bytes": resident()}
    sys.stdout.write(json.dumps(values))


def memory_of(folder: Path, variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Load time and memory of every variant, each in a process of its own."""
    found = {}
    for variant in variants:
        command = [sys.executable, "-m", "benchmarks.decode", "--child", str(folder), variant]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    return found


def speed_rows(
    folder: Path, lengths: tuple[int, int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Prefill and decode of every variant in turns."""
    prefill, decode = lengths
    models = {variant: opened(folder, variant) for variant in arguments.variants}
    rows = []
    for batch in arguments.batches:
        others = tables.Others()
        ids = torch.randint(SHAPE["vocab_size"] // 100, (batch, prefill // batch))
        seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in models}
        for turn in range(arguments.rounds):
            for variant, model in models.items():
                seconds[variant].append(timed(model, ids, decode if turn else 2))
        for phase, place, tokens in (("prefill", 0, prefill // batch), ("decode", 1, decode)):
            later = {
                variant: statistics.median(pair[place] for pair in pairs[1:])
                for variant, pairs in seconds.items()
            }
            found = _rows(phase, batch, tokens, later)
            rows += [row | {"others": others.share()} for row in found]
    return rows


def _rows(phase: str, batch: int, tokens: int, seconds: dict[str, float]) -> list[dict[str, Any]]:
    peers = [peer for peer in PEERS if peer in seconds]
    best = min(seconds[peer] for peer in peers)
    least = TARGETS.get(tables.machine(), {}).get(batch) if phase == "decode" else None
    return [
        {
            "case": f"{phase}, batch {batch}: {variant}",
            "tokens": batch * tokens,
            "values": "bf16",
            "seconds": own,
            "tokens_per_second": batch * tokens / own,
            "ratio": {
                **{peer: seconds[peer] / own for peer in peers},
                "transformers_best": best / own,
            },
            "target": {"transformers_bf16": least} if least and variant not in PEERS else {},
        }
        for variant, own in seconds.items()
    ]


def show_memory(rows: list[dict[str, Any]]) -> None:
    """Load time and memory."""
    table = Table(title="in a process of its own", title_justify="left")
    for name in ("variant", "load s", "resident GB", "peak GB"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        sizes = (f"{row['memory'][f'{name}_bytes'] / 1e9:.2f}" for name in ("resident", "peak"))
        table.add_row(row["case"].removeprefix("load: "), f"{row['seconds']:.1f}", *sizes)
    Console(width=130).print(table)


def memory_rows(folder: Path, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Load time and memory as rows; the ratio is of load times."""
    found = memory_of(folder, variants)
    seconds = {variant: figures["load_seconds"] for variant, figures in found.items()}
    return [
        {
            "case": f"load: {variant}",
            "tokens": 0,
            "values": "bf16",
            "seconds": own,
            "ratio": {peer: seconds[peer] / own for peer in PEERS if peer in seconds},
            "memory": found[variant],
        }
        for variant, own in seconds.items()
    ]


def run(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Write the models unless they are there, then measure and show what was asked for."""
    config = MixtralConfig(**SHAPE | (QUICK if arguments.quick else {}))
    written = folder / "parameters.json"
    if not written.is_file():
        write_json(written, write_models(folder, config))
    title = f"Mixtral of {read_json(written) / 1e9:.2f} billion parameters"
    rows: list[dict[str, Any]] = []
    if arguments.only != "speed":
        rows = memory_rows(folder, arguments.variants)
        show_memory(rows)
    if arguments.only != "memory":
        lengths = (64, 8) if arguments.quick else (PREFILL, DECODE)
        found = speed_rows(folder, lengths, arguments)
        tables.show(found, title)
        rows += found
    return rows


def main() -> None:
    """Run all, print the tables, write the JSON if asked."""
    parser = tables.parser("decode", __doc__)
    tables.in_pieces(parser)
    parser.add_argument("--rounds", type=int, default=3, help="the first one warms up")
    parser.add_argument("--models", type=Path, help="keep the models in this folder")
    parser.add_argument("--only", choices=("memory", "speed"), help="measure just this")
    parser.add_argument("--batches", type=tables.numbers, default=BATCHES, help="as 1,8")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = tables.applied(parser.parse_args())
    logging.disable_progress_bar()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return
    if not set(PEERS) & set(arguments.variants):
        parser.error(f"--variants needs one of {', '.join(PEERS)} to compare with")
    with tempfile.TemporaryDirectory(prefix="moiety-decode-") as name:
        folder = arguments.models or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run(arguments, folder)
    tables.write(rows, arguments.json, add=arguments.add)


if __name__ == "__main__":
    main()
