"""The answer in sentences: do experts specialise, where, and what does routing cost or gain?

Every sentence carries its numbers, and says so when the evidence is not there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moiety.analysis.reporting.words import measured
from moiety.analysis.statistics import RoutingSummary
from moiety.analysis.tables import mean_over, section, size
from moiety.analysis.visible import visible_line

LEVEL = 0.05
STRONG, WEAK, NEGLIGIBLE = 0.5, 0.1, 0.01
"""Normalised mutual information above chance from which words are used."""
CLEAR = 0.001


def verdict(summary: RoutingSummary) -> str:
    """One line: whether experts specialise by domain, and how much."""
    null = summary.nmi.overall
    if len(summary.header.domains) < 2:
        return "One domain only: nothing to compare"
    if summary.smallest_p > LEVEL:
        return "Too few documents to tell whether experts specialise by domain"
    if null.p_value > LEVEL:
        return "No evidence that experts specialise by domain"
    excess = null.observed - null.mean
    if not specialised(summary):
        return "Experts do not specialise by domain: what exceeds chance is negligible"
    degree = "strongly " if excess > STRONG else "weakly " if excess < WEAK else ""
    if summary.vocabulary.conditional.p_value > LEVEL:
        return f"Experts specialise {degree}by vocabulary; no more of the domain is shown"
    return f"Experts specialise {degree}by domain"


def specialised(summary: RoutingSummary) -> bool:
    """Whether experts know more of the domain than chance gives, and enough to speak of."""
    null = summary.nmi.overall
    return null.p_value <= LEVEL and null.observed - null.mean >= NEGLIGIBLE


def findings(summary: RoutingSummary, results: Mapping[str, Any]) -> list[str]:
    """The argument, a sentence or two each: evidence, own domain, where, cost, bytes."""
    sentences = [
        _evidence(summary),
        _own_domain(summary),
        _where(summary),
        _cost(results),
        _bytes(results),
    ]
    return [sentence for sentence in sentences if sentence]


def key_figures(summary: RoutingSummary, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers to remember, each with what to compare it to."""
    null, own = summary.nmi.overall, summary.own_domain_share
    figures = [
        (f"{null.observed:.2f}", f"normalised mutual information; chance {null.mean:.2f}"),
    ]
    if own:
        chance = 1 / len(summary.header.experts)
        share = sum(own.values()) / len(own)
        figures.append(
            (f"{share:.0%}", f"of tokens first to their own expert; chance {chance:.0%}")
        )
    learned, oracle = _means(results, ("composite", "oracle"))
    if learned is not None and oracle is not None:
        figures.append((f"{learned:.3f}", f"nats per token, learned router; oracle {oracle:.3f}"))
    sizes = section(results, "bytes")
    sparse, dense = sizes.get("composite"), sizes.get("dense_composite")
    if sparse and dense:
        figures.append((f"{sparse / dense:.0%}", f"of the dense composite's {size(dense)}"))
    return figures


def _evidence(summary: RoutingSummary) -> str:
    if len(summary.header.domains) < 2:
        return ""
    null = summary.nmi.overall
    documents = sum(summary.header.documents.values())
    form = "{:.3f}" if null.observed >= NEGLIGIBLE else "{:.5f}"
    corrected = f", corrected for bias {measured(null, form)}"
    sentence = (
        f"Top-1 expert and domain share a normalised mutual information of "
        f"{form.format(null.observed)}{'' if null.corrected != null.corrected else corrected}. "
        f"Relabelling the {documents:,} documents at random gives {form.format(null.mean)} on average "
        f"and at most {form.format(null.quantile_95)} in 95% of {summary.permutations:,} permutations "
        f"(p = {null.p_value:.2g})."
    )
    if summary.smallest_p > LEVEL:
        sentence += f" So few documents cannot give less than p = {summary.smallest_p:.2g}."
    return sentence


def _own_domain(summary: RoutingSummary) -> str:
    own = summary.own_domain_share
    if not own:
        return "No domain has an expert of its name, so there is no own-domain share to report."
    mean = sum(own.values()) / len(own)
    low, high = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
    share = f"{mean:.0%}"
    if (
        summary.own_share is not None
        and summary.own_share.overall.low == summary.own_share.overall.low
    ):
        share = measured(summary.own_share.overall, "{:.0%}")
    sentence = (
        f"A token goes first to its own domain's expert {share} of the time; "
        f"chance is {1 / len(summary.header.experts):.0%}."
    )
    least, most = f"{own[low]:.0%}", f"{own[high]:.0%}"
    if least != most:
        sentence += (
            f" It ranges from {least} for {visible_line(low)} to {most} for {visible_line(high)}."
        )
    return sentence


def _where(summary: RoutingSummary) -> str:
    layers = summary.nmi.layers
    if len(layers) < 2 or len(summary.header.domains) < 2:
        return ""
    values = [null.observed for null in layers]
    best, worst = values.index(max(values)), values.index(min(values))
    passed = sum(layer.adjusted_p <= LEVEL for layer in layers)
    tested = f"{passed} of {len(layers)} layers exceed chance at a false discovery rate of 5%."
    if not specialised(summary):
        return tested
    return (
        f"Routing follows the domain most in layer {best} ({values[best]:.3f}) and least in "
        f"layer {worst} ({values[worst]:.3f}); {tested}"
    )


def _cost(results: Mapping[str, Any]) -> str:
    learned, oracle, uniform = _means(results, ("composite", "oracle", "uniform"))
    if learned is None or (oracle is None and uniform is None):
        return ""
    parts = [f"The learned router costs {learned:.3f} nats per token, mean over domains"]
    if oracle is not None:
        parts.append(f"always taking the own-domain expert (oracle) costs {oracle:.3f}")
    if uniform is not None:
        parts.append(f"equal weights on all experts cost {uniform:.3f}")
    sentence = "; ".join(parts) + "."
    if oracle is None or uniform is None:
        return sentence
    return f"{sentence} {_gap(learned, oracle, uniform)}"


def _gap(learned: float, oracle: float, uniform: float) -> str:
    if uniform - oracle < CLEAR:
        return (
            "The oracle is no better than equal weights, so there is no gap for a router to close."
        )
    closed = (uniform - learned) / (uniform - oracle)
    if closed < 0:
        return "The learned router is worse than equal weights."
    if closed > 1:
        return "The learned router does better than the oracle: mixing experts pays."
    return f"The router closes {closed:.0%} of the gap between the two."


def _bytes(results: Mapping[str, Any]) -> str:
    sizes = section(results, "bytes")
    sparse, dense = sizes.get("composite"), sizes.get("dense_composite")
    if not sparse or not dense:
        return ""
    sentence = (
        f"The composite weighs {size(sparse)}, {sparse / dense:.0%} of the {size(dense)} "
        "of the same composite with dense experts"
    )
    sparse_loss, dense_loss = _means(results, ("composite", "composite_dense"))
    if sparse_loss is None or dense_loss is None:
        return f"{sentence}."
    change = sparse_loss - dense_loss
    more = "more" if change >= 0 else "less"
    return f"{sentence}, at a loss {abs(change):.3f} nats per token {more}."


def _means(results: Mapping[str, Any], rows: Sequence[str]) -> list[float | None]:
    losses = section(results, "loss")
    present = dict.fromkeys(domain for key in losses for domain in section(losses, key))
    return [mean_over(section(losses, row), list(present)) for row in rows]
