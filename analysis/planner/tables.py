"""A memory plan for a terminal."""

from moiety.analysis.planner.plan import MemoryPlan, Use
from moiety.analysis.tables import ABSENT, Table
from moiety.units import size

PART_COLUMNS = ("part", "held as", "weights", "bytes", "bits a weight")
USE_COLUMNS = (
    "matrices",
    "weights",
    "KV cache",
    "activations",
    "overhead",
    "total",
    "fits",
    "longest context",
    "most experts",
    "decode tokens/s",
)


def plan_tables(plan: MemoryPlan) -> list[Table]:
    """The parts of the weights, and what each format of the matrices would take."""
    parts = tuple(
        (
            part.name,
            part.kind,
            f"{part.weights:,}",
            size(part.bytes),
            f"{8 * part.bytes / max(1, part.weights):.2f}",
        )
        for part in plan.parts
    )
    return [
        Table(title=f"weights of {plan.model}", columns=PART_COLUMNS, rows=parts),
        Table(
            title=_title(plan),
            columns=USE_COLUMNS,
            rows=tuple(_row(use) for use in plan.uses),
            note=_note(plan),
        ),
    ]


def _title(plan: MemoryPlan) -> str:
    card = f"on {plan.card.name} ({size(plan.card.memory)})" if plan.card else "memory"
    batch = f", batch {plan.batch}" if plan.batch > 1 else ""
    return f"{card}, context {plan.context:,}{batch}, KV cache in {plan.cache_dtype}"


def _row(use: Use) -> tuple[str, ...]:
    return (
        use.name,
        *(size(part) for part in (use.weights, use.cache, use.activations, use.overhead)),
        size(use.total),
        ABSENT if use.fits is None else "yes" if use.fits else "NO",
        ABSENT if use.longest is None else f"{use.longest:,}" if use.longest else "none",
        ABSENT if use.most_experts is None else f"{use.most_experts:,}",
        ABSENT if use.tokens_per_second is None else f"{use.tokens_per_second:,.0f}",
    )


def _note(plan: MemoryPlan) -> str:
    parts = ["Activations and overhead are estimates."]
    if plan.limit:
        parts.append(f"The model's own limit is {plan.limit:,} tokens.")
    if plan.experts:
        parts.append(f"{plan.experts} experts, {plan.active} a token.")
    if plan.card and plan.card.bandwidth:
        parts.append(f"Decoding is bounded by {size(plan.card.bandwidth)}/s; real speed is lower.")
    return " ".join(parts)
