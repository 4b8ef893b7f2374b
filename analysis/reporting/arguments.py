"""What further results add to the answer, in sentences with their numbers."""

from collections.abc import Mapping

from moiety.analysis.headline import specialised
from moiety.analysis.reporting.words import LEVEL, extremes, interval, measured, p_value, quoted
from moiety.analysis.results import (
    Comparison,
    Counterfactuals,
    GateSwap,
    Interval,
    Retention,
    RoutingSummary,
)


def token_identity(summary: RoutingSummary) -> str:
    """Whether routing follows the domain or only its words."""
    left = summary.vocabulary.conditional
    whole = summary.information.overall
    if len(summary.header.domains) < 2 or not specialised(summary) or not whole.corrected > 0:
        return ""
    sentence = (
        f"Expert and domain share {measured(whole)} nats; with the token known, {measured(left)} "
        f"({p_value(left.p_value)})"
    )
    if left.p_value <= LEVEL:
        return f"{sentence}: the same word is routed differently in different domains."
    return f"{sentence}: what looks like domain may be vocabulary."


def cells(summary: RoutingSummary) -> str:
    """How many domain and expert pairs stand out."""
    found = summary.cells
    if not found.tested or len(summary.header.domains) < 2:
        return ""
    return (
        f"{found.found:,} of {found.tested:,} pairs of domain and expert, layer by layer, differ from "
        "the mean over domains at a false discovery rate of 5%."
    )


def regret(found: Counterfactuals) -> str:
    """What the learned route costs above hindsight."""
    low, high = extremes(found.document_regret)
    sentence = (
        "Against the best single expert of each document, chosen by hindsight, the learned route "
        f"costs {interval(found.document_regret[high])} nats per token more in {quoted(high)}"
    )
    if low != high:
        sentence += f" and {interval(found.document_regret[low])} in {quoted(low)}"
    return sentence + "."


def removal(found: Counterfactuals) -> str:
    """Which experts matter."""
    whole = [one for one in (*found.left_out, *found.ablated) if one.layer is None]
    if not whole:
        return ""
    kind = found.left_out if any(one.layer is None for one in found.left_out) else found.ablated
    changes = [one for one in kind if one.layer is None]
    most = max(changes, key=lambda one: one.overall.value)
    matter = sum(one.adjusted_p <= LEVEL and one.overall.value > 0 for one in changes)
    return (
        f"Leaving out {quoted(found.experts[most.expert])} costs most: "
        f"{interval(most.overall)} nats per token; {matter} of {len(changes)} experts cost anything at "
        "a false discovery rate of 5%."
    )


def redundancy(found: Counterfactuals) -> str:
    """Which experts can be exchanged."""
    if not found.swaps:
        return ""
    pairs = [
        f"{quoted(found.experts[one.first])} and {quoted(found.experts[one.second])}"
        for one in found.swaps
        if one.redundant
    ]
    if not pairs:
        return f"No two experts can be exchanged within {found.margin:g} nats per token."
    shown = "; ".join(pairs[:5]) + (f" and {len(pairs) - 5} more pairs" if len(pairs) > 5 else "")
    return f"Exchanged at a cost of at most {found.margin:g} nats per token: {shown}."


def sparsity(found: Retention) -> str:
    """What sparsity costs at home and away."""
    return (
        f"Sparsity costs a finetune {interval(found.home)} nats per token at home and "
        f"{interval(found.away)} away from home."
    )


def comparison_verdict(found: Comparison) -> str:
    """One line about two traces."""
    values = list(found.overlap.values())
    known = [one.value for one in values if one.value == one.value]
    agreement = float(found.agreement_L.mean())
    if not known:
        return f"Different numbers of experts; their partitions agree to {agreement:.2f}"
    overlap = sum(known) / len(known)
    chance = float(found.chance_DL.mean())
    if overlap > 0.999:
        return "The same tokens go to the same experts"
    above = (overlap - chance) / (1 - chance) if chance < 1 else 0.0
    word = "nearly the same" if above > 0.9 else "partly the same" if above > 0.1 else "unrelated"
    return f"Routes are {word}: {overlap:.0%} of the experts are shared"


def comparison_numbers(found: Comparison) -> list[tuple[str, str]]:
    """The few numbers to remember of two traces."""
    overlap, chance = float(found.overlap_DL.mean()), float(found.chance_DL.mean())
    numbers = []
    if overlap == overlap:
        numbers.append((f"{overlap:.0%}", f"of a token's experts are shared; chance {chance:.0%}"))
        numbers.append((f"{found.drift_DL.mean():.2f}", "drift of the loads, 0 to 1"))
    if found.loss_change:
        mean = sum(one.value for one in found.loss_change.values()) / len(found.loss_change)
        numbers.append((f"{mean:+.3f}", "nats per token, second less first"))
    return numbers


def _overlap(found: Comparison) -> str:
    known = {name: one for name, one in found.overlap.items() if one.value == one.value}
    low, high = extremes(known)

    def told(domain: str) -> str:
        chance = float(found.chance_DL[found.domains.index(domain)].mean())
        return f"{interval(known[domain], '{:.1%}')} in {quoted(domain)} (chance {chance:.1%})"

    sentence = "Of the experts that a token went to in the first, the share that it went to in the second too is "
    return sentence + (told(low) if low == high else f"from {told(low)} to {told(high)}") + "."


def _loss_change(found: Comparison) -> str:
    low, high = extremes(found.loss_change)
    values = [f"{interval(found.loss_change[d], '{:+.3f}')} in {quoted(d)}" for d in (low, high)]
    shown = values[0] if low == high else " to ".join(values)
    return f"The second's loss differs by {shown}, nats per token, paired by document."


def _gate_swap(found: GateSwap) -> str:
    def worst(change: Mapping[str, Interval]) -> str:
        _, domain = extremes(change)
        return f"{interval(change[domain], '{:+.3f}')} in {quoted(domain)}"

    return (
        "With the second's gates the first model's loss changes by at most "
        f"{worst(found.change_first)}; with the first's gates the second's by at most "
        f"{worst(found.change_second)}, nats per token."
    )


def comparison_findings(found: Comparison) -> list[str]:
    """The argument about two traces."""
    sentences = (
        [_overlap(found)] if any(one.value == one.value for one in found.overlap.values()) else []
    )
    agreement = found.agreement_L
    sentences.append(
        f"Whatever the experts are called, the two partition tokens alike to "
        f"{agreement.mean():.2f} (adjusted mutual information; 0 chance, 1 the same), most in layer "
        f"{int(agreement.argmax())}, least in layer {int(agreement.argmin())}."
    )
    sentences.append(_loss_change(found))
    if found.gate_swap is not None:
        sentences.append(_gate_swap(found.gate_swap))
    return sentences
