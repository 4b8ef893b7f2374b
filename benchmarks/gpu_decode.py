"""`python -m benchmarks.gpu_decode [--quick] [--json FILE]`: whole mixtures of 8 B shape on a GPU.

Mixtral with the layers of an 8 B Llama, random weights made on the card: one step of decoding as a
CUDA graph, two dense experts a layer in transformers against the same two 2:4 through moiety, in
turns; then how many such experts fit on the card, dense and sparse, each loaded and generating.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, StaticCache

from benchmarks import gpu_timing, tables
from benchmarks.gpu_experts import dense_of, random_planes
from moiety.experts import kernels
from moiety.experts.modules import SparseExperts
from moiety.experts.pattern import Pattern
from moiety.files import write_json

SHAPE: dict[str, int] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 8192,
}
QUICK = {"num_hidden_layers": 2, "vocab_size": 1024}
CONTEXT, STEPS, TARGET, KV_BYTES = 512, 64, 1.20, 8 << 30


def _config(shape: dict[str, Any], experts: int) -> MixtralConfig:
    return MixtralConfig(**shape, num_local_experts=experts)


def mixture(config: MixtralConfig, kind: str | None) -> MixtralForCausalLM:
    """A mixture with random weights on the card; packed as `kind`, or dense."""
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(config).bfloat16().eval()
    for layer in model.model.layers:
        stock = layer.mlp.experts
        layer.mlp.experts = nn.Identity()
        _fill(layer)
        layer.mlp.experts = _experts(config, stock, kind)
    _fill(model)
    return model


def _fill(module: nn.Module) -> None:
    """Random numbers of about unit gain where nothing is yet."""
    for name, tensor in list(module.named_parameters()):
        if tensor.is_meta:
            made = torch.empty(tensor.shape, dtype=torch.bfloat16, device="cuda")
            _ = made.fill_(1.0) if made.dim() == 1 else made.normal_(std=tensor.shape[-1] ** -0.5)
            _set(module, name, nn.Parameter(made, requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            head = buffer.shape[-1] * 2
            steps = torch.arange(0, head, 2, device="cuda").float() / head
            _set(module, name, 1e6**-steps)


def _set(module: nn.Module, name: str, value: Any) -> None:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(value, nn.Parameter):
        setattr(owner, last, value)
    else:
        owner.register_buffer(last, value, persistent=False)


def _experts(config: MixtralConfig, stock: Any, kind: str | None) -> nn.Module:
    count, inner, width = config.num_local_experts, config.intermediate_size, config.hidden_size
    shapes = ((2 * inner, width), (width, inner))
    if kind is None:
        for name, shape in zip(("gate_up_proj", "down_proj"), shapes, strict=True):
            made = [dense_of(random_planes(1, *shape, "bf16")) for _ in range(count)]
            setattr(stock, name, nn.Parameter(torch.cat(made), requires_grad=False))
        return stock
    with torch.device("meta"):
        experts = SparseExperts(config, stock, Pattern(2, 4), None if kind == "bf16" else kind)
    for name, shape in zip(("gate_up_proj", "down_proj"), shapes, strict=True):
        made = [kernels.untiled(random_planes(1, *shape, kind))[:3] for _ in range(count)]
        for end, parts in zip(("", "_mask", "_scale"), zip(*made, strict=True), strict=True):
            tensors = [part for part in parts if isinstance(part, torch.Tensor)]
            if tensors:
                parameter = nn.Parameter(torch.cat(tensors), requires_grad=False)
                setattr(experts, f"{name}{end}", parameter)
    experts.prepare()
    return experts


def step(model: MixtralForCausalLM) -> Callable[[int], object]:
    """One decoding step after a prefill of CONTEXT tokens; room in the cache for STEPS of them."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS)
    ids = torch.randint(model.config.vocab_size, (1, CONTEXT), device="cuda")
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, -1:].clone()
    position = torch.full((1, 1), CONTEXT, device="cuda")
    return lambda _: (
        model(token, past_key_values=cache, position_ids=position, use_cache=True).logits
    )


def speed(config: MixtralConfig) -> list[dict[str, Any]]:
    """Tokens a second of one sequence, dense and 2:4 in turns."""
    variants = {"dense": None, "2:4 bf16": "bf16", "2:4 int8": "int8", "2:4 int4": "int4"}
    models = {name: mixture(config, kind) for name, kind in variants.items()}
    steps = {name: step(model) for name, model in models.items()}
    seconds = gpu_timing.interleaved(steps, turns=2, rounds=7)
    return [
        {
            "case": name,
            "tokens": 1,
            "values": variants[name] or "dense bf16",
            "seconds": own,
            "tokens_per_second": 1 / own,
            "ratio": {"dense": seconds["dense"] / own},
            "target": {"dense": TARGET} if name == "2:4 bf16" else {},
            "bytes": _bytes(models[name]),
        }
        for name, own in seconds.items()
    ]


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def capacity(shape: dict[str, int], kind: str | None) -> dict[str, Any]:
    """As many experts as fit beside KV_BYTES of cache: made, and asked for a few tokens."""
    total = torch.cuda.get_device_properties(0).total_memory
    free = torch.cuda.mem_get_info()[0]
    one, two = (_estimate(shape, count, kind) for count in (1, 2))
    count = max(1, int((free - KV_BYTES - one) // (two - one)) + 1)
    model: Any = mixture(_config(shape, count), kind)
    ids = torch.randint(shape["vocab_size"], (1, 16), device="cuda")
    output = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return {
        "values": kind or "dense bf16",
        "experts": count,
        "bytes": _bytes(model),
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "card_bytes": total,
        "generated": output.shape[1] - ids.shape[1],
    }


def _estimate(shape: dict[str, int], count: int, kind: str | None) -> int:
    width, inner, layers = (
        shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    bits = {None: 16, "bf16": 9, "int8": 5.125, "int4": 3.125}[kind]
    shared = 2 * (2 * shape["vocab_size"] * width + layers * 2.5 * width * width)
    return int(shared + layers * count * 3 * width * inner * bits / 8)


def main() -> None:
    """Run all, print, write the JSON if asked."""
    arguments = tables.parser("gpu_decode", __doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU, but torch sees none; run this where there is one")
    torch.manual_seed(0)
    shape = SHAPE | (QUICK if arguments.quick else {})
    with torch.inference_mode():
        rows = speed(_config(shape, 2))
        found = []
        for kind in (None, "bf16"):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found.append(capacity(shape, kind))
    head = gpu_timing.card()
    console = Console(width=150)
    for row in rows:
        console.print(
            f"{row['case']:10} {row['tokens_per_second']:7.1f} tokens/s, {row['ratio']['dense']:.2f} "
            f"of dense, {row['bytes'] / 1e9:.2f} GB {tables.verdict(row)}"
        )
    for row in found:
        console.print(
            f"{row['values']}: {row['experts']} experts a layer, {row['bytes'] / 1e9:.1f} GB of "
            f"{row['card_bytes'] / 1e9:.1f} GB, {row['generated']} tokens generated"
        )
    console.print(str(head))
    if arguments.json:
        write_json(arguments.json, {**head, "rows": rows, "capacity": found})


if __name__ == "__main__":
    main()
