"""Traces with a known amount of information between domain and expert."""

from typing import Any

import numpy
import pyarrow
from scipy.special import xlogy

from moiety.analysis.trace import Header, Trace

DOMAINS = ("arithmetic", "code", "law", "prose")


def planted_trace(
    purity: float,
    *,
    documents: int = 20,
    tokens: int = 40,
    layers: int = 2,
    habit: float = 0.0,
    by_token: float = 0.0,
    phase: int = 0,
    seed: int = 0,
) -> Trace:
    """Tokens go to their domain's expert with probability `purity`, else to any of the four.

    `habit` is the strength of documents' own preferences, which have nothing to do with domains.
    With `by_token` a token of that share is one of its domain's own types, and the route follows
    the type, not the domain.
    """
    generator = numpy.random.default_rng(seed)
    experts = len(DOMAINS)
    count = documents * experts
    document_T = numpy.repeat(numpy.arange(count), tokens)
    domain_M = numpy.repeat(numpy.arange(experts), documents)
    domain_T = domain_M[document_T]
    own_T = domain_T
    token_T = generator.integers(0, 10, count * tokens) + 100
    if by_token:
        typical_T = generator.random(len(token_T)) < by_token
        token_T[typical_T] = domain_T[typical_T]
        own_T = numpy.where(typical_T, token_T, generator.integers(0, experts, len(token_T)))
    liking_ME = numpy.exp(habit * generator.normal(size=(count, experts)))
    liking_ME /= liking_ME.sum(1, keepdims=True)
    edges_ME = liking_ME.cumsum(1)
    first_TL = numpy.empty((len(token_T), layers), numpy.int16)
    for layer in range(layers):
        drawn_T = (generator.random((len(token_T), 1)) > edges_ME[document_T]).sum(1)
        follows_T = generator.random(len(token_T)) < purity
        first_TL[:, layer] = numpy.where(follows_T, own_T, drawn_T.clip(max=experts - 1))
    return make_trace(document_T, domain_T, token_T, first_TL, tokens, phase)


def make_trace(
    document_T: Any, domain_T: Any, token_T: Any, first_TL: Any, length: int, phase: int = 0
) -> Trace:
    """A trace of two routes a token, the second one to the next expert."""
    experts, layers = len(DOMAINS), first_TL.shape[1]
    sizes = numpy.bincount(domain_T, minlength=experts)
    documents = [len(numpy.unique(document_T[domain_T == d])) for d in range(experts)]
    routes_TLA = numpy.stack([first_TL, (first_TL + 1) % experts], -1).astype(numpy.int16)
    weights_TLA = numpy.broadcast_to(numpy.array([0.75, 0.25], numpy.float32), routes_TLA.shape)
    loss_T = numpy.linspace(1, 2, len(document_T), dtype=numpy.float32)
    return Trace(
        header=Header(
            model="planted",
            experts=DOMAINS,
            layers=tuple(f"layers.{layer}" for layer in range(layers)),
            active=2,
            tokens=dict(zip(DOMAINS, sizes.tolist(), strict=True)),
            documents=dict(zip(DOMAINS, documents, strict=True)),
            context_length=length,
            vocabulary=400,
        ),
        document_T=document_T.astype(numpy.int32),
        domain_T=domain_T.astype(numpy.int32),
        phase_T=numpy.full(len(document_T), phase, numpy.int32),
        window_T=numpy.zeros(len(document_T), numpy.int32),
        position_T=(numpy.arange(len(document_T)) % length).astype(numpy.int32),
        token_id_T=token_T.astype(numpy.int32),
        loss_T=loss_T,
        experts_TLA=routes_TLA,
        weights_TLA=weights_TLA,
        entropy_TL=numpy.ones(first_TL.shape, numpy.float32),
        text_T=pyarrow.chunked_array([pyarrow.array(["x"] * len(document_T))]),
    )


def known_information(purity: float, experts: int = 4) -> float:
    """Nats between domain and expert of `planted_trace` without habits."""
    own = purity + (1 - purity) / experts
    other = (1 - purity) / experts
    return float(numpy.log(experts) + xlogy(own, own) + (experts - 1) * xlogy(other, other))
