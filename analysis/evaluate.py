"""Measure models on held-out text: loss by domain, exact answers, speed, bytes."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moiety.compose.composite import Composite
from moiety.compose.ensemble import EnsembleForCausalLM
from moiety.compose.opening import open_any
from moiety.compose.routed.modules import RoutedLinear
from moiety.errors import InputError
from moiety.experts import kernels
from moiety.experts.kernels.weights import DTYPES, INTEGERS
from moiety.experts.modules import PackedModule, SparseExperts, SparseLinear
from moiety.progress import SILENT, Progress
from moiety.routers import RoutePolicy, find_gates, forced, one_hot, random, sequence_level, uniform
from moiety.scoring import Score, score
from moiety.text import Windows, read_documents, token_windows

Scores = dict[str, Score]

BF16_BYTES = 2


@dataclass(frozen=True)
class Problem:
    """A prompt with the one answer that counts as right."""

    prompt: str
    answer: str


def read_problems(path: str | Path) -> list[Problem]:
    """Read JSONL rows `{"prompt": ..., "answer": ...}`; InputError names a line that is not one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected problems in {path}, but: {error}") from error
    problems = [_problem(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]
    if not problems:
        raise InputError(f"expected problems in {path}, but it is empty")
    return problems


def _problem(line: str, place: str) -> Problem:
    try:
        row = json.loads(line)
        return Problem(str(row["prompt"]), str(row["answer"]))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise InputError(
            f'expected {{"prompt": ..., "answer": ...}} in {place}, but: {error!r}'
        ) from error


def domain_scores(model: nn.Module, data: Mapping[str, Windows], batch_size: int = 8) -> Scores:
    """Score of the model on every domain."""
    return {domain: score(model, windows, batch_size) for domain, windows in data.items()}


def router_scores(
    composite: Composite,
    data: Mapping[str, Windows],
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> dict[str, Scores]:
    """Scores of a composite under its own router and under the controls.

    Rows: `composite` (learned), `uniform`, `random`, `sequence_level`, and `oracle`, which sends
    every token to the expert of its domain.
    """
    if isinstance(composite.model, EnsembleForCausalLM):
        return _ensemble_scores(composite, composite.model, data, batch_size)
    policies = _policies(composite, data, seed)
    gates = find_gates(composite.model)
    rows: dict[str, Scores] = {"composite": domain_scores(composite.model, data, batch_size)}
    for name, policy_of in progress.track(policies.items(), "router controls", len(policies)):
        rows[name] = {}
        for domain, windows in data.items():
            with forced(gates, policy_of(domain)):
                rows[name][domain] = score(composite.model, windows, batch_size)
    return rows


def _ensemble_scores(
    composite: Composite, model: EnsembleForCausalLM, data: Mapping[str, Windows], batch_size: int
) -> dict[str, Scores]:
    """An ensemble's rows: its posterior, equal weights, and the own expert's weight 1."""
    composite.own_expert(data)
    rows: dict[str, Scores] = {"composite": domain_scores(model, data, batch_size), "oracle": {}}
    with model.forced([1.0] * len(composite.experts)):
        rows["uniform"] = domain_scores(model, data, batch_size)
    for domain, windows in data.items():
        with model.forced(domain):
            rows["oracle"][domain] = score(model, windows, batch_size)
    return rows


def _policies(
    composite: Composite, data: Mapping[str, Windows], seed: int
) -> dict[str, Callable[[str], RoutePolicy]]:
    own = composite.own_expert(data)
    return {
        "uniform": lambda _domain: uniform(),
        "random": lambda _domain: random(seed),
        "sequence_level": lambda domain: sequence_level(data[domain].ids_WC.shape[1]),
        "oracle": lambda domain: one_hot(own[domain]),
    }


def as_tables(rows: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    """`loss` and `bits_per_byte` by row and domain."""
    loss = {row: {d: s.loss for d, s in scores.items()} for row, scores in rows.items()}
    bits = {row: {d: s.bits_per_byte for d, s in scores.items()} for row, scores in rows.items()}
    return {"loss": loss, "bits_per_byte": bits}


def evaluate(
    model: str | Path | Composite,
    data: Mapping[str, str | Path],
    *,
    context_length: int = 512,
    windows: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Evaluate a model (folder, hub id or already open) on labelled held-out text.

    A composite that routes comes with the router controls, and `data` names each domain's text by
    its expert; any other model has the one row `model`. Returns the results as
    `moiety eval --json` prints them: context length, seed, loss, bits per byte, bytes, tokens per
    second.
    """
    documents = {domain: read_documents(path) for domain, path in data.items()}
    composite = model if isinstance(model, Composite) else open_any(model)
    routes = bool(composite.experts)
    if routes:
        composite.own_expert(data)
    cut = {
        domain: token_windows(composite.tokenizer, texts, context_length, windows)
        for domain, texts in documents.items()
    }
    if routes:
        rows = router_scores(composite, cut, seed=seed, batch_size=batch_size, progress=progress)
    else:
        rows = {"model": domain_scores(composite.model, cut, batch_size)}
    sizes = model_bytes(composite.model)
    return {
        "context_length": context_length,
        "seed": seed,
        "domains": list(data),
        **as_tables(rows),
        "bytes": sizes if routes else _bytes_alone(sizes),
        "tokens_per_second": {next(iter(rows)): speed(composite.model)},
        "device": device_name(),
    }


def _bytes_alone(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of a model that is no composite, and of its dense twin if it has packed matrices."""
    dense = {"dense_model": sizes["dense_composite"]} if sizes["experts_packed"] else {}
    return {**dense, "model": sizes["composite"]}


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: Any, problems: Sequence[Problem], batch_size: int = 32
) -> float:
    """Share of problems whose greedy continuation is the answer, up to the end of the line."""
    right = 0
    for start in range(0, len(problems), batch_size):
        part = problems[start : start + batch_size]
        texts = continue_greedily(model, tokenizer, [p.prompt for p in part], _longest(part))
        for problem, text in zip(part, texts, strict=True):
            right += text.split("\n")[0].strip() == problem.answer.strip()
    return right / len(problems)


def _longest(problems: Sequence[Problem]) -> int:
    return max(len(problem.answer.encode()) for problem in problems) + 1


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    """What the model writes after each prompt, without the prompt."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [start + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    longest = max(len(row) for row in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(  # pyright: ignore[reportCallIssue]
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=padding,
    )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


@torch.no_grad()
def speed(
    model: PreTrainedModel, *, prompt: int = 128, new_tokens: int = 16, repeats: int = 3
) -> dict[str, float]:
    """Tokens per second of a prefill and of one-at-a-time decoding, batch 1, medians."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, int(model.config.vocab_size), (1, prompt), generator=generator)
    prefill, decode = [], []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        cache = model(input_ids=ids, use_cache=True).past_key_values
        middle = time.perf_counter()
        for _step in range(new_tokens):
            cache = model(input_ids=ids[:, -1:], past_key_values=cache).past_key_values
        prefill.append(prompt / (middle - begin))
        decode.append(new_tokens / (time.perf_counter() - middle))
    return {"prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[1:])}


def model_bytes(model: nn.Module) -> dict[str, int]:
    """Weight bytes of a packed composite, as it is stored, and of the same one with dense experts.

    `experts_packed` counts kept values, masks and scales; `experts_dense` the same matrices dense
    in the values' own dtype, bf16 where those are integers. In the dense twin whole finetunes
    take the place of a base with differences. What the kernels of a device hold may be less
    (`packed_bytes` of the modules).
    """
    packed = dense = buffers = replaced = 0
    for module in model.modules():
        if isinstance(module, PackedModule):
            packed += module.stored_bytes
            buffers += module.stored_bytes - sum(held.nbytes for held in module.packed_tensors)
            buffers += sum(buffer.nbytes for buffer in module.buffers())
        if isinstance(module, SparseExperts | SparseLinear | RoutedLinear):
            for name in module.widths:
                weights = module.weights(name)
                integers = weights.kind in INTEGERS
                size = BF16_BYTES if integers else DTYPES[weights.stored_kind].itemsize
                dense += weights.stack * weights.rows * weights.columns * size
            if isinstance(module, RoutedLinear) and module.weight is not None:
                replaced += module.weight.nbytes
    total = buffers + sum(parameter.nbytes for parameter in model.parameters())
    return {
        "dense_composite": total - packed - replaced + dense,
        "composite": total,
        "experts_dense": dense,
        "experts_packed": packed,
    }


def device_name() -> str:
    """What the speed was measured on."""
    threads, isa = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"CPU, {threads} threads, {isa}; {kernels.description()}"
