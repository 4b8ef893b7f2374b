"""An ensemble with static keys and values: pieces, padding, windows, compiled steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

from moiety.compose.ensemble import EnsembleCache, EnsembleConfig, EnsembleForCausalLM
from moiety.errors import InputError

NAMES = ["law", "code"]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
ROOM = 16


def ensemble(architecture: Any = LlamaConfig, **fields: Any) -> EnsembleForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    config = EnsembleConfig(
        text_config=architecture(**{**sizes, **fields}), moiety={"experts": NAMES}
    )
    return EnsembleForCausalLM(config).eval().requires_grad_(False)


def static(model: EnsembleForCausalLM) -> EnsembleCache:
    return EnsembleCache(model.config.get_text_config(), len(NAMES), tokens=ROOM)


def fed(step: Any, cache: EnsembleCache, mask_BS: Tensor, ends: tuple[int, ...]) -> Iterator[Any]:
    """Outputs of calls that end after so many tokens."""
    start = 0
    positions = (mask_BS.cumsum(1) - 1).clamp(min=0)
    for end in ends:
        yield step(
            IDS[:, start:end],
            attention_mask=mask_BS[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        start = end


@pytest.mark.parametrize("window", [None, 5])
def test_pieces_give_what_the_whole_gives(window: int | None) -> None:
    """With padding on the left; again after a reset."""
    model = ensemble(MistralConfig, sliding_window=window)
    mask_BS = torch.ones_like(IDS)
    mask_BS[0, :3] = 0
    positions = (mask_BS.cumsum(1) - 1).clamp(min=0)
    whole = model(IDS, attention_mask=mask_BS, position_ids=positions, use_cache=False)
    cache, real = static(model), mask_BS.bool()
    for _ in range(2):
        outputs = list(fed(model, cache, mask_BS, (7, 8, 9, 10, 11, 12)))
        for name in ("logits", "posterior"):
            found = torch.cat([output[name] for output in outputs], 1)
            torch.testing.assert_close(found[real], whole[name][real], rtol=1e-4, atol=2e-5)
        shapes = {layer.keys.shape[2] for layer in cache.layers}  # pyright: ignore
        assert shapes == {window or ROOM}
        cache.reset()


def test_a_compiled_step_is_the_plain_one() -> None:
    model, mask_BS = ensemble(), torch.ones_like(IDS)
    compiled: Any = torch.compile(model, backend="eager")
    plain, traced = static(model), static(model)
    expected = list(fed(model, plain, mask_BS, (10, 11, 12)))
    model(IDS[:, :10], past_key_values=traced)
    for number in (10, 11):
        output = compiled(IDS[:, number : number + 1], past_key_values=traced)
        torch.testing.assert_close(output.logits, expected[number - 9].logits)
        torch.testing.assert_close(output.posterior, expected[number - 9].posterior)


def test_it_cannot_be_cropped() -> None:
    model = ensemble()
    cache = model(IDS, past_key_values=static(model)).past_key_values
    with pytest.raises(InputError, match="a dynamic cache to crop, but this one is static"):
        cache.crop(-1)
