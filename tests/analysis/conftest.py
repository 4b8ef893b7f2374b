"""A tokenizer made in memory, tiny mixtures of experts, and planted traces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moiety.analysis.trace.file import HEADER, ROUTES, Header
from moiety.analysis.trace.writer import RouteWriter
from moiety.files import new_folder, write_json

EXPERTS = 4
LAYERS = 3
ACTIVE = 2

SENTENCES = ["The court of appeal held that", "def add(a, b): return a + b", "12 + 30 = 42"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, so that emoji and Chinese span several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>")


def _mixtral() -> Any:
    config = MixtralConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
    )
    return MixtralForCausalLM(config)


def _qwen() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=False,
    )
    return Qwen3MoeForCausalLM(config)


@pytest.fixture(params=[_mixtral, _qwen], ids=["mixtral", "qwen3-moe"])
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny random mixture of experts whose gates differ between tokens."""
    torch.manual_seed(0)
    made = request.param().eval()
    for name, parameter in made.named_parameters():
        if "gate.weight" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return made


@pytest.fixture
def plant(tmp_path: Path) -> Callable[..., Path]:
    """Write a trace whose tokens go to the expert of their domain with probability `purity`."""

    def planted(
        purity: float = 1.0,
        texts: list[str] | None = None,
        domains: tuple[str, ...] = ("arithmetic", "code", "law", "prose"),
        documents: int = 6,
        length: int = 20,
        active: int = ACTIVE,
    ) -> Path:
        return _plant(tmp_path / "trace", purity, texts, domains, documents, length, active)

    return planted


def _plant(
    out: Path,
    purity: float,
    texts: list[str] | None,
    domains: tuple[str, ...],
    documents: int,
    length: int,
    active: int,
) -> Path:
    generator = numpy.random.default_rng(0)
    with new_folder(out) as scratch:
        with RouteWriter(scratch / ROUTES) as writer:
            for code, domain in enumerate(domains):
                for document in range(code * documents, (code + 1) * documents):
                    top_TL = generator.integers(0, len(domains), (length, LAYERS))
                    top_TL[generator.random(top_TL.shape) < purity] = code
                    experts_TLA = (top_TL[..., None] + numpy.arange(active)) % len(domains)
                    writer.add(domain, _columns(generator, document, experts_TLA, texts))
        header = Header(
            model="tiny",
            experts=domains,
            layers=tuple(f"layers.{layer}.gate" for layer in range(LAYERS)),
            active=active,
            tokens=dict(writer.tokens),
            documents=dict.fromkeys(domains, documents),
            context_length=length,
            vocabulary=400,
        )
        write_json(scratch / HEADER, header.to_dict())
    return out


def _columns(
    generator: numpy.random.Generator,
    document: int,
    experts_TLA: numpy.ndarray[Any, Any],
    texts: list[str] | None,
) -> dict[str, Any]:
    length, layers, active = experts_TLA.shape
    weights_A = numpy.array([1.0] if active == 1 else [0.75, 0.25], numpy.float32)
    loss_T = generator.random(length, dtype=numpy.float32)
    loss_T[0] = numpy.nan
    words = texts or ["The", " court", " held", "\n"]
    index_T = numpy.arange(length, dtype=numpy.int32)
    return {
        "document": numpy.full(length, document, numpy.int32),
        "window": numpy.zeros(length, numpy.int32),
        "position": index_T,
        "token_id": index_T,
        "text": [words[at % len(words)] for at in range(length)],
        "phase": (index_T == length - 1).astype(numpy.int32),
        "loss": loss_T,
        "experts": experts_TLA.reshape(length, -1).astype(numpy.int16),
        "weights": numpy.tile(weights_A, (length, layers)),
        "entropy": generator.random((length, layers), dtype=numpy.float32),
    }
