"""Train the demo's base and its finetunes: small Llama models, a fixed number of steps.

W windows, C context length (tokens in a window).
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from moiety.demo.muon import Muon
from moiety.demo.sizes import DOMAINS, DemoSize
from moiety.progress import SILENT, Progress
from moiety.text import read_documents

_WARMUP = 0.1
_DECAY = 0.6
_LAST_STEPS = 20


def train_base(
    folder: Path,
    size: DemoSize,
    *,
    seed: int,
    corpora: Path,
    tokenizer: Path,
    progress: Progress = SILENT,
) -> None:
    """Train a new model on equal parts of every domain and save it to `folder`."""
    reader = AutoTokenizer.from_pretrained(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config(size, reader))
    windows = [read_windows(corpora, domain, reader, size.context_length) for domain in DOMAINS]
    batches = seeded_batches(windows, rows=size.rows, steps=size.base_steps, seed=seed)
    optimizers = _optimizers(model, size.matrix_rate, size.vector_rate)
    fit(model, batches, optimizers, steps=size.base_steps, name="base", progress=progress)
    _save(folder, model, reader)


def train_finetune(
    folder: Path,
    size: DemoSize,
    *,
    domain: str,
    seed: int,
    corpora: Path,
    base: Path,
    progress: Progress = SILENT,
) -> None:
    """Train everything of `base` but its tied embeddings on one domain; save it to `folder`."""
    reader = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    windows = [read_windows(corpora, domain, reader, size.context_length)]
    batches = seeded_batches(windows, rows=size.rows, steps=size.finetune_steps, seed=seed)
    share = size.finetune_share
    optimizers = _optimizers(model, share * size.matrix_rate, share * size.vector_rate)
    fit(model, batches, optimizers, steps=size.finetune_steps, name=domain, progress=progress)
    _save(folder, model, reader)


def config(size: DemoSize, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The shape of a demo model: Llama with tied embeddings and no biases."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,  # pyright: ignore[reportArgumentType]
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        dtype="float32",
    )


def read_windows(corpora: Path, domain: str, tokenizer: Any, context_length: int) -> Tensor:
    """Pack the train documents of a domain into full windows (W, C) of token ids.

    Documents are joined by the end-of-sequence token; every window starts with the
    beginning-of-sequence token, as it does when a model is judged.
    """
    texts = read_documents(corpora / domain / "train.jsonl")
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for document in encoded for token in [*document, tokenizer.eos_token_id]]
    step = context_length - 1
    whole = len(ids) // step
    body_WC = torch.tensor(ids[: whole * step]).reshape(whole, step)
    start_W1 = torch.full((whole, 1), tokenizer.bos_token_id)
    return torch.cat([start_W1, body_WC], dim=1)


def seeded_batches(windows: list[Tensor], *, rows: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches of `rows` windows (rows, C), the same share of each corpus.

    Every corpus is read in a new random order each time it has been read through.
    """
    generator = torch.Generator().manual_seed(seed)
    share = max(1, rows // len(windows))
    orders = [_endless_order(len(corpus_WC), generator) for corpus_WC in windows]
    for _ in range(steps):
        picked = (
            corpus_WC[[next(order) for _ in range(share)]]
            for corpus_WC, order in zip(windows, orders, strict=True)
        )
        yield torch.cat(list(picked))


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def fit(
    model: torch.nn.Module,
    batches: Iterable[Tensor],
    optimizers: list[Optimizer],
    *,
    steps: int,
    name: str,
    progress: Progress = SILENT,
) -> None:
    """Train `model` in place on next-token prediction, one step a batch."""
    accelerator = Accelerator()
    model, *optimizers = accelerator.prepare(model.train(), *optimizers)
    schedules = [LambdaLR(each, partial(rate_share, steps=steps)) for each in optimizers]
    losses: list[Tensor] = []
    for ids_WC in progress.track(batches, f"train {name}", steps):
        ids_WC = ids_WC.to(accelerator.device)
        loss = model(input_ids=ids_WC, labels=ids_WC, use_cache=False).loss
        accelerator.backward(loss)
        for part in (*optimizers, *schedules):
            part.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(loss.detach())
    last = torch.stack(losses[-_LAST_STEPS:]).mean().item()
    progress.note(f"{name}: loss {last:.3f} nats a token after {steps} steps")


def rate_share(step: int, *, steps: int) -> float:
    """The share of the peak learning rate at a step: up linearly, level, down linearly."""
    rise = (step + 1) / max(1.0, _WARMUP * steps)
    fall = (steps - step) / (_DECAY * steps)
    return max(0.0, min(1.0, rise, fall))


def _optimizers(model: torch.nn.Module, matrix_rate: float, vector_rate: float) -> list[Optimizer]:
    trained = [(name, part) for name, part in model.named_parameters() if part.requires_grad]
    matrices = [part for name, part in trained if part.ndim == 2 and "embed" not in name]
    others = [part for name, part in trained if part.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=matrix_rate),
        AdamW(others, lr=vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model.requires_grad_(True)
    model.to("cpu").save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
