"""A tiny world for end-to-end tests: one base, finetunes of it, their text, a recipe."""

# Triton looks at its environment once, when something first imports it.
import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from moiety.text import write_documents

# At the first use of a device torch notes which functions make tensors. Were that in a test that
# replaces one of them, later models meant to have no weights would have some.
with torch.device("meta"):
    torch.empty(0)

WORDS = {
    "letters": "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "colours": "red green blue yellow orange purple black white pink brown cyan teal",
}
CONTEXT = 32


@dataclass(frozen=True)
class World:
    """Paths of the tiny base, finetunes, texts and recipe."""

    folder: Path
    base: Path
    finetunes: dict[str, Path]
    texts: dict[str, dict[str, Path]]
    tokenizer: Any

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe as plain values; `changes` replace whole sections."""
        experts = [
            {
                "name": name,
                "model": str(self.finetunes[name]),
                "domain": {kind: str(path) for kind, path in self.texts[name].items()},
            }
            for name in self.finetunes
        ]
        recipe = {
            "base": str(self.base),
            "experts": experts,
            "context_length": CONTEXT,
            "calibration_windows": 16,
            "route": {"train_steps": 4},
            "evaluate": {"windows": 8},
        }
        return {**recipe, **changes}

    def write_recipe(self, path: Path, **changes: Any) -> Path:
        """The recipe as a YAML file."""
        path.write_text(yaml.safe_dump(self.recipe(**changes), sort_keys=False))
        return path


def documents(domain: str, count: int, seed: int) -> list[str]:
    """Short random texts out of one domain's words."""
    generator = torch.Generator().manual_seed(seed)
    words = WORDS[domain].split()
    picks = torch.randint(len(words), (count, 60), generator=generator).tolist()
    return [" ".join(words[pick] for pick in row) for row in picks]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the three domains' words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for domain in WORDS for text in documents(domain, 20, seed=0)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def tiny_llama(vocabulary: int, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of about 50k parameters."""
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.1,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def train_briefly(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> None:
    """A few steps of next-token training, embeddings frozen."""
    model.get_input_embeddings().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.requires_grad_(True)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Forget what a test compiled: eight models of one process are all that torch.compile keeps."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny world, made once."""
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    base = tiny_llama(len(tokenizer))
    _save(base, tokenizer, folder / "base")
    finetunes, texts = {}, {}
    for number, domain in enumerate(WORDS):
        texts[domain] = {}
        for kind, seed in (("calibration", 1), ("heldout", 2)):
            texts[domain][kind] = folder / f"{domain}.{kind}.jsonl"
            write_documents(texts[domain][kind], documents(domain, 24, 10 * number + seed))
        finetune = LlamaForCausalLM.from_pretrained(folder / "base")
        ids = torch.tensor(
            [tokenizer(text)["input_ids"][:CONTEXT] for text in documents(domain, 16, number)]
        )
        train_briefly(finetune, ids, steps=12)
        finetunes[domain] = folder / domain
        _save(finetune, tokenizer, finetunes[domain])
    return World(folder, folder / "base", finetunes, texts, tokenizer)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
