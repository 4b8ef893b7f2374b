"""The loss of tokens, in pieces and at once."""

import pytest
import torch
from torch.nn import functional

from moiety import scoring
from moiety.scoring import token_losses


@pytest.mark.parametrize("piece", [1, 90, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(scoring, "PIECE", piece)
    logits, ids = torch.randn(3, 9, 40).to(dtype), torch.randint(40, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = token_losses(logits, ids, mask)
    rows, targets = logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    nats = functional.cross_entropy(rows, targets, reduction="none").view(3, 8)
    assert torch.equal(found[:, 1:], nats.masked_fill(mask[:, 1:] == 0, 0.0))
    assert found.dtype == torch.float32 and not found[:, 0].any()
    learned = token_losses(logits.requires_grad_(), ids, mask)
    assert learned.requires_grad and torch.equal(learned, found)
    assert token_losses(logits[:, :1], ids[:, :1], mask[:, :1]).shape == (3, 1)
