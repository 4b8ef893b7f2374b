"""How the numbers of a report were obtained, and what they do not show."""

from collections.abc import Mapping
from typing import Any

from moiety.analysis.headline import NEGLIGIBLE, STRONG, WEAK
from moiety.analysis.results import Comparison, Counterfactuals, GateSwap, RoutingSummary
from moiety.analysis.visible import visible_line

Method = tuple[str, str]
SHARES = (
    "Routes are what the gates chose, not recomputed. A token's active weights are scaled to sum to 1. "
    "Own-domain share: tokens whose heaviest expert is that of their domain, mean over layers; chance "
    "is 1 / number of experts. MaxVio is (max - mean) / mean of the load; entropy is that of the "
    "gate's softmax over all experts."
)
CAVEATS = (
    "Domains differ in vocabulary, so routing by token looks like routing by domain: the information "
    "left once the token is known says how much is more than that. Information about the domain is "
    "not proof of domain knowledge in an expert; what shows it are losses under other routes, where "
    "measured. One trace is one model, one seed of training and these documents."
)


def of_trace(summary: RoutingSummary) -> list[Method]:
    """What was done with one trace."""
    header = summary.header
    documents = sum(header.documents.values())
    routes = "first expert" if summary.counted == "first" else "active experts"
    return [
        (
            "Unit",
            "Documents, not tokens. Tokens of one document are alike, and a test that counts them as "
            "independent finds an effect where there is none. The null permutes the domain labels of "
            f"{documents:,} whole documents, {summary.permutations:,} times, seed {summary.seed}; "
            "p = (1 + permutations at least as large) / (1 + permutations). The least p that this "
            f"design can give is {summary.smallest_p:.2g}. Intervals resample documents, "
            f"{summary.resamples:,} times.",
        ),
        (
            "Information",
            f"NMI = I(E;D) / √(H(E) H(D)) between a token's {routes} E and its domain D, in each layer, "
            "domains weighted equally; overall it is the mean over layers. As counted it is biased "
            "upwards in small samples; the corrected value takes a jackknife over documents off. "
            f"The headline says negligible under {NEGLIGIBLE:g} above chance, weakly under {WEAK:g}, "
            f"strongly over {STRONG:g}, whatever the p-value. "
            "Layers are adjusted for false discovery after Benjamini and Hochberg.",
        ),
        ("Shares", SHARES),
        (
            "Loss",
            "Nats per token, given the tokens before it in its window (at most "
            f"{header.context_length:,} tokens). The first token of a window has none. Padding is left "
            "out everywhere.",
        ),
        ("Phase", _phases(summary)),
    ]


def _phases(summary: RoutingSummary) -> str:
    if set(summary.phases) <= {"prefill"}:
        return "Routes are those of prefill: whole windows at once. Decoding may route differently."
    told = (f"{phase.tokens:,} tokens of {name}" for name, phase in summary.phases.items())
    return f"The trace holds {' and '.join(told)}; both count in every statistic."


def of_counterfactuals(found: Counterfactuals) -> list[Method]:
    """What was done to the routes."""
    told = [
        (name.replace("_", " ").capitalize(), visible_line(protocol))
        for name, protocol in found.protocols.items()
    ]
    return told + [
        ("Regret of each token", visible_line(one.protocol)) for one in found.token_regret
    ]


def of_comparison(found: Comparison) -> list[Method]:
    """How two traces are compared."""
    return [
        (
            "Unit",
            f"{found.tokens:,} tokens that both traces hold, matched by document and position; "
            f"intervals resample documents, seed {found.seed}.",
        ),
        (
            "Overlap",
            "Of the experts that a token went to in the first, the share that it went to in the second "
            "too. Chance pairs tokens of a domain at random, so a model whose load is uneven has a high "
            "chance level.",
        ),
        (
            "Agreement",
            "Adjusted mutual information of the first experts: it ignores how experts are numbered.",
        ),
        *(_gate_swap(found.gate_swap) if found.gate_swap is not None else []),
        (
            "Caveats",
            "Experts of two models have the same number without being the same expert unless one was "
            "made from the other. Equal routes are not equal models.",
        ),
    ]


def _gate_swap(found: GateSwap) -> list[Method]:
    one, other = (visible_line(name) for name in found.models)
    return [
        (
            "Gates exchanged",
            f"Each model ran once with its own gates and once with the other's ({one} and {other}), "
            "on text of the same domains; changes are paired by document.",
        )
    ]


def of_run(results: Mapping[str, Any]) -> list[Method]:
    """Where measured results come from."""
    parts = []
    if results.get("device"):
        parts.append(f"Device: {visible_line(str(results['device']))}.")
    if results.get("seed") is not None:
        parts.append(f"Seed: {visible_line(str(results['seed']))}.")
    if parts and results.get("context_length") is not None:
        context = visible_line(str(results["context_length"]))
        parts.append(f"Context length of the measured losses: {context} tokens.")
    return [("Run", " ".join(parts))] if parts else []
