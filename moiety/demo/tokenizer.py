"""The demo's tokenizer: byte-level BPE over all domains alike, with every digit by itself."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moiety.errors import InputError
from moiety.text import read_documents

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_SMALLEST = 256 + 3


def train_tokenizer(
    folder: Path, corpora: Path, domains: tuple[str, ...], *, vocabulary: int, context_length: int
) -> None:
    """Train a tokenizer on the train splits of `corpora`, equally weighted, and save it.

    Any text survives encoding and decoding unchanged. Raises InputError when `vocabulary` has no
    room for every byte.
    """
    if vocabulary < _SMALLEST:
        raise InputError(f"vocabulary must be at least {_SMALLEST}, but it is {vocabulary}")
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(equal_shares(corpora, domains), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def equal_shares(corpora: Path, domains: tuple[str, ...]) -> Iterator[str]:
    """Yield documents of the train splits, as many characters of each domain as of the smallest."""
    texts = {domain: read_documents(corpora / domain / "train.jsonl") for domain in domains}
    share = min(sum(map(len, documents)) for documents in texts.values())
    for documents in texts.values():
        left = share
        for document in documents:
            if left <= 0:
                break
            yield document[:left]
            left -= len(document)
