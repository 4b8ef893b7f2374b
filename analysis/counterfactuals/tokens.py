"""Regret by token: what another expert for one token would have saved.

N predicted tokens, E experts, W windows, C context length.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor, nn

from moiety.analysis.counterfactuals.changes import force_one
from moiety.analysis.losses import LabelledWindows
from moiety.analysis.results.counterfactuals import TokenRegret
from moiety.analysis.statistics.measures import Floats
from moiety.routers import Gate, rerouted
from moiety.scoring import token_losses

WHOLE = (
    "whole-document hindsight: each token's loss less that of the expert which, forced on the "
    "whole document, gave this token the least loss; optimistic, the best of E is chosen by its "
    "own loss"
)
ONE = (
    "one-token intervention: one token is sent to each expert in every layer, all others keep "
    "their routes, and the next token's loss is compared; tokens drawn at random, best of E by "
    "hindsight"
)


def whole_document(text: LabelledWindows, learned_N: Floats, forced_EN: Floats) -> TokenRegret:
    """Regret of every token over the best of the experts that were forced."""
    regret_N = learned_N - forced_EN.min(0)
    return TokenRegret(
        protocol=WHOLE,
        tokens=len(regret_N),
        by_domain=text.documents.by_domain(text.by_document(regret_N)),
    )


@torch.no_grad()
def one_token(
    model: nn.Module,
    gates: Sequence[Gate],
    text: LabelledWindows,
    experts: Sequence[int],
    tokens: int,
    seed: int,
) -> TokenRegret:
    """Regret of `tokens` tokens of each domain, each sent to every expert by itself."""
    generator = numpy.random.default_rng((seed, 10))
    documents = text.documents
    nats_M, count_M = numpy.zeros((2, len(documents.domain_M)))
    first = 0
    for windows in text.windows.values():
        _, number_W = windows.document_W.unique(return_inverse=True)
        length_W = windows.mask_WC.sum(1)
        for _ in range(tokens):
            row = int(generator.integers(len(windows)))
            place = int(generator.integers(0, int(length_W[row]) - 1))
            ids_C = windows.ids_WC[row, : place + 2]
            document = first + int(number_W[row])
            nats_M[document] += _regret(model, gates, ids_C, experts)
            count_M[document] += 1
        first += int(number_W.max()) + 1
    sampled = replace(documents, tokens_M=count_M.astype(numpy.int64))
    return TokenRegret(
        protocol=ONE,
        tokens=tokens * len(text.windows),
        by_domain=sampled.by_domain(nats_M),
    )


def _regret(
    model: nn.Module, gates: Sequence[Gate], ids_C: Tensor, experts: Sequence[int]
) -> float:
    """The last token's loss by the model's own routes less the best by another of the one before.

    One row an expert, and a last one without a change.
    """
    rows, length = len(experts) + 1, len(ids_C)
    expert_WC = torch.full((rows, length), -1)
    expert_WC[: len(experts), -2] = torch.tensor(list(experts))
    device = next(model.parameters()).device
    ids_WC = ids_C.expand(rows, length).to(device)
    mask_WC = torch.ones_like(ids_WC)
    with rerouted(gates, force_one(expert_WC.flatten())):
        logits_WCV = model(input_ids=ids_WC, attention_mask=mask_WC, use_cache=False).logits
    loss_W = token_losses(logits_WCV[:, -2:], ids_WC[:, -2:], mask_WC[:, -2:])[:, -1]
    return float(loss_W[-1] - loss_W[:-1].min())
