"""`python -m benchmarks.statistics [--json FILE]`: every statistic of a large synthetic trace.

A trace of 1 M tokens, 32 layers, 2 routes a token is made in memory, with tokens that follow a
Zipf law, routes that lean on document and domain, and windows; then `summarise` runs once. Time
and the process's peak memory are held against their targets, 60 s and 4 GiB on two cores.
"""

import time
from typing import Any

import numpy
import pyarrow
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.memory import peak
from benchmarks.tables import device, parser, write
from moiety.analysis.statistics import summarise
from moiety.analysis.trace import Header, Trace

SECONDS, GIBIBYTES = 60.0, 4.0
DOMAINS = ("code", "law", "arithmetic", "prose")
WINDOW, WINDOWS_A_DOCUMENT = 256, 4
VOCABULARY = 32_000


def synthetic(tokens: int, layers: int, experts: int, active: int, seed: int = 0) -> Trace:
    """A trace whose routes lean on their document and, less, on their domain."""
    generator = numpy.random.default_rng(seed)
    document_T = (numpy.arange(tokens) // (WINDOW * WINDOWS_A_DOCUMENT)).astype(numpy.int32)
    documents = int(document_T[-1]) + 1
    domain_M = (numpy.arange(documents) * len(DOMAINS) // documents).astype(numpy.int32)
    lean_DE = generator.gumbel(size=(len(DOMAINS), experts)) / 2
    lean_ME = lean_DE[domain_M] + generator.gumbel(size=(documents, experts)) / 4
    domain_T = domain_M[document_T]
    names, sizes = DOMAINS, numpy.bincount(domain_T, minlength=len(DOMAINS))
    header = Header(
        model="synthetic",
        experts=tuple(f"expert {number}" for number in range(experts)),
        layers=tuple(f"layers.{number}" for number in range(layers)),
        active=active,
        tokens=dict(zip(names, sizes.tolist(), strict=True)),
        documents=dict(zip(names, numpy.bincount(domain_M).tolist(), strict=True)),
        context_length=WINDOW,
        vocabulary=VOCABULARY,
    )
    return Trace(
        header=header,
        document_T=document_T,
        domain_T=domain_T,
        phase_T=numpy.zeros(tokens, numpy.int32),
        window_T=(numpy.arange(tokens) // WINDOW % WINDOWS_A_DOCUMENT).astype(numpy.int32),
        position_T=(numpy.arange(tokens) % WINDOW).astype(numpy.int32),
        token_id_T=(generator.zipf(1.2, tokens) % VOCABULARY).astype(numpy.int32),
        loss_T=generator.random(tokens, dtype=numpy.float32),
        experts_TLA=_routes(generator, lean_ME[document_T], layers, active),
        weights_TLA=numpy.full((tokens, layers, active), 1 / active, numpy.float32),
        entropy_TL=generator.random((tokens, layers), dtype=numpy.float32),
        text_T=pyarrow.chunked_array([pyarrow.array(["x"] * tokens)]),
    )


def _routes(
    generator: numpy.random.Generator, lean_TE: NDArray[Any], layers: int, active: int
) -> NDArray[numpy.int16]:
    """The `active` best of leaning plus Gumbel noise: draws without replacement."""
    routes = numpy.empty((len(lean_TE), layers, active), numpy.int16)
    for layer in range(layers):
        score_TE = lean_TE - numpy.log(generator.exponential(size=lean_TE.shape))
        for rank in range(active):
            best_T = score_TE.argmax(1)
            routes[:, layer, rank] = best_T
            score_TE[numpy.arange(len(best_T)), best_T] = -numpy.inf
    return routes


def main() -> None:
    """Make the trace, time its summary, print and write the figures."""
    made = parser("statistics", __doc__)
    made.add_argument("--tokens", type=int, default=1_000_000)
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--experts", type=int, default=8)
    made.add_argument("--active", type=int, default=2)
    arguments = made.parse_args()
    tokens = 20_000 if arguments.quick else arguments.tokens
    trace = synthetic(tokens, arguments.layers, arguments.experts, arguments.active)
    start = time.perf_counter()
    summary = summarise(trace)
    seconds = time.perf_counter() - start
    most = peak() / 2**30
    row = {
        "tokens": tokens,
        "layers": arguments.layers,
        "experts": arguments.experts,
        "active": arguments.active,
        "permutations": summary.permutations,
        "resamples": summary.resamples,
        "seconds": seconds,
        "peak_gib": most,
        "target": {"seconds": SECONDS, "peak_gib": GIBIBYTES},
    }
    met = seconds <= SECONDS and most <= GIBIBYTES
    Console().print(
        f"{tokens:,} tokens x {arguments.layers} layers x top-{arguments.active} of "
        f"{arguments.experts}: {seconds:.1f} s, peak {most:.2f} GiB ({device()}); target "
        f"{SECONDS:.0f} s and {GIBIBYTES:.0f} GiB {'met' if met else 'missed'}",
        highlight=False,
    )
    write([row], arguments.json)


if __name__ == "__main__":
    main()
