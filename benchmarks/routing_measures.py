"""What one router does to text: loss, where tokens go, how soon it follows a switch, its cost.

W windows, C context length, T tokens (unpadded), L routed layers, A active experts, E experts,
D domains.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.timing import interleaved
from moiety.analysis.statistics.measures import (
    entropy,
    mutual_information,
    token_shares,
    top_counts,
    top_share,
    weight_share,
)
from moiety.routers import Gate, Route, RoutePolicy, find_gates, forced, watched
from moiety.routers.labelled import LabelledText
from moiety.scoring import token_losses

Policy = Callable[[Tensor], RoutePolicy]
"""From the own experts of a batch's tokens (W, C), -1 for none, to the route to force."""
PLACES = (8, 16, 32, 64)
AROUND = 4
STEPS = 128
PROMPT = 32


@dataclass(frozen=True)
class Reading:
    """One text seen through a router: nats a token, and the route of every unpadded token.

    `own_WC` is the share of the routing weight that goes to the token's own expert, mean over
    layers.
    """

    loss: float
    experts_TLA: NDArray[numpy.integer]
    weights_TLA: NDArray[numpy.floating]
    own_WC: Tensor


@torch.no_grad()
def read(
    model: PreTrainedModel, text: LabelledText, policy: Policy | None = None, batch_size: int = 8
) -> Reading:
    """Run a text through a composite under its own router, or under a forced policy."""
    gates = find_gates(model)
    nats, experts, weights, own = 0.0, [], [], []
    for batch in text.batches(batch_size):
        routes: list[Route] = []
        with contextlib.ExitStack() as stack:
            if policy is not None:
                stack.enter_context(forced(gates, policy(batch.own_WC)))
            stack.enter_context(watched(gates, routes.append))
            logits_WCV = model(
                input_ids=batch.ids_WC, attention_mask=batch.mask_WC, use_cache=False
            ).logits
        nats += float(token_losses(logits_WCV, batch.ids_WC, batch.mask_WC).double().sum())
        experts_TLA, weights_TLA = _columns(routes)
        own.append(_own_shares(experts_TLA, weights_TLA, batch.own_WC))
        kept_T = batch.mask_WC.flatten().bool().numpy()
        experts.append(experts_TLA[kept_T])
        weights.append(weights_TLA[kept_T])
    tokens = int(text.mask_WC[:, 1:].sum())
    return Reading(
        nats / tokens, numpy.concatenate(experts), numpy.concatenate(weights), torch.cat(own)
    )


def _columns(routes: Sequence[Route]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Experts and their weights of every layer (T, L, A), the largest weight first."""
    experts, weights = [], []
    for route in sorted(routes, key=lambda route: route.layer):
        weights_TA, order_TA = route.weights_TA.float().sort(dim=-1, descending=True, stable=True)
        experts.append(route.experts_TA.gather(-1, order_TA))
        weights.append(weights_TA)
    return torch.stack(experts, 1).numpy(), torch.stack(weights, 1).numpy()


def _own_shares(experts_TLA: NDArray[Any], weights_TLA: NDArray[Any], own_WC: Tensor) -> Tensor:
    tokens, layers, active = experts_TLA.shape
    shares_TLA = token_shares(weights_TLA.reshape(-1, active)).reshape(tokens, layers, active)
    hit_TLA = experts_TLA == own_WC.reshape(-1, 1, 1).numpy()
    return torch.from_numpy((shares_TLA * hit_TLA).sum(-1).mean(-1)).view(own_WC.shape)


def routing_figures(readings: Mapping[str, Reading], experts: int) -> dict[str, float]:
    """How routes and domains belong together; domain number d owns expert d, domains equal.

    `own_domain_share`: share of tokens whose largest weight is their own expert's;
    `normalized_mutual_information` of domain and that expert; `load_entropy`: entropy of the
    mean routing weight over experts, 1 for an even load and 0 for a single expert.
    """
    experts_TLA = numpy.concatenate([reading.experts_TLA for reading in readings.values()])
    weights_TLA = numpy.concatenate([reading.weights_TLA for reading in readings.values()])
    sizes = [len(reading.experts_TLA) for reading in readings.values()]
    domain_T, domains = numpy.repeat(numpy.arange(len(sizes)), sizes), len(sizes)
    counts_LDE = top_counts(experts_TLA, domain_T, domains, experts)
    share_DLE = weight_share(experts_TLA, weights_TLA, domain_T, domains, experts)
    own_DL = top_share(counts_LDE)[numpy.arange(domains), :, numpy.arange(domains)]
    return {
        "own_domain_share": float(own_DL.mean()),
        "normalized_mutual_information": float(mutual_information(counts_LDE)[1].mean()),
        "load_entropy": float(entropy(share_DLE.mean(0)).mean() / math.log(experts)),
    }


def shares_after(own_WC: Tensor, switch: int) -> dict[str, float]:
    """Weight of the own expert so many tokens after a switch, mean over `AROUND` either side."""
    after_C = own_WC[:, switch:].mean(0)
    return {
        str(place): float(after_C[place - AROUND : place + AROUND].mean())
        for place in PLACES
        if place + AROUND <= len(after_C)
    }


@contextlib.contextmanager
def held(gates: Sequence[Gate], active: int) -> Iterator[None]:
    """Let gates compute nothing inside the block: every token has one route, made beforehand."""
    experts_1A = torch.arange(active)[None]
    weights_1A = torch.full((1, active), 1 / active)

    def hold(gate: Gate) -> None:
        logits_1E = torch.zeros(1, gate.experts)

        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            tokens = hidden.numel() // hidden.shape[-1]
            return (
                logits_1E.expand(tokens, -1),
                weights_1A.expand(tokens, -1),
                experts_1A.expand(tokens, -1),
            )

        gate.module.forward = forward

    for gate in gates:
        hold(gate)
    try:
        yield
    finally:
        for gate in gates:
            del gate.module.forward


@torch.no_grad()
def decode_overhead(
    model: PreTrainedModel, plain: PreTrainedModel, ids_C: Tensor, steps: int = STEPS
) -> tuple[float, float]:
    """Share of a decoded token's time that routing adds, and how many milliseconds that is.

    Batch 1, medians of turns about.

    Against `plain`, another composite of the same experts without memory of earlier tokens, whose
    route is computed once, for as many experts a token.
    """
    gates = find_gates(plain)
    active = find_gates(model)[0].active
    start = min(PROMPT, len(ids_C) // 2)
    rounds = min(steps, len(ids_C) - start - 4)
    with held(gates, active):
        contenders = {
            "router": _Decoder(model, ids_C, start),
            "constant": _Decoder(plain, ids_C, start),
        }
        seconds = interleaved(contenders, rounds)
    extra = seconds["router"] - seconds["constant"]
    return extra / seconds["constant"], 1000 * extra


class _Decoder:
    """Takes the next token of a text at every call."""

    def __init__(self, model: PreTrainedModel, ids_C: Tensor, start: int) -> None:
        self.model, self.ids_1C, self.place = model, ids_C[None], start
        output: Any = model(input_ids=self.ids_1C[:, :start], use_cache=True)
        self.cache = output.past_key_values

    def __call__(self) -> None:
        token_11 = self.ids_1C[:, self.place : self.place + 1]
        self.model(input_ids=token_11, past_key_values=self.cache, use_cache=True)
        self.place += 1
