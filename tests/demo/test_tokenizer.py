"""The tokenizer opens like any other and loses nothing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moiety.demo.models import DOMAINS, DemoModels, DemoSize
from moiety.demo.tokenizer import BOS, EOS, PAD, equal_shares, train_tokenizer
from moiety.errors import InputError
from moiety.text import read_documents


@pytest.fixture(scope="module")
def tokenizer(models: DemoModels) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(models.base)


@pytest.mark.parametrize("domain", DOMAINS)
def test_corpora_survive(
    models: DemoModels, tokenizer: PreTrainedTokenizerFast, domain: str
) -> None:
    for text in read_documents(models.corpora / domain / "heldout.jsonl"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@given(text=st.text())
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast, tiny: DemoSize) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert len(tokenizer) == tiny.vocabulary


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.tokenize("17 + 25 = 42")
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("172542")


def test_prompt_and_answer_meet_at_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("17 + 25 = 42") == [
        *tokenizer.tokenize("17 + 25 ="),
        *tokenizer.tokenize(" 42"),
    ]


def test_domains_weigh_the_same(models: DemoModels) -> None:
    texts = list(equal_shares(models.corpora, DOMAINS))
    smallest = min(
        sum(map(len, read_documents(models.corpora / domain / "train.jsonl"))) for domain in DOMAINS
    )
    assert sum(map(len, texts)) == len(DOMAINS) * smallest


def test_a_vocabulary_without_every_byte_is_refused(models: DemoModels, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 259"):
        train_tokenizer(tmp_path, models.corpora, DOMAINS, vocabulary=200, context_length=32)
