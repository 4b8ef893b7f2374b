"""Tables of a pruning run: every matrix, its error after each step, bytes."""

from moiety.analysis.tables import Table
from moiety.experts import PruneReport


def pruning_table(title: str, report: PruneReport) -> Table:
    """Relative output errors on calibration text, a row a matrix, means last."""
    steps = list(report.errors)
    rows = [
        (
            matrix.name,
            "x".join(str(size) for size in matrix.shape),
            matrix.pattern,
            *(f"{matrix.errors[step]:.2e}" for step in steps),
        )
        for matrix in report.matrices
    ]
    rows.append(("mean", "", "", *(f"{error:.2e}" for error in report.errors.values())))
    saved = (
        f"{report.packed_bytes:,} of {report.dense_bytes:,} bytes "
        f"({report.packed_bytes / report.dense_bytes:.0%}), {report.calibration_tokens:,} "
        f"calibration tokens in windows of {report.settings.context_length}, "
        f"{report.seconds:.1f} s"
    )
    columns = ("matrix", "shape", "pattern", *(f"error: {step}" for step in steps))
    return Table(
        title=f"{title}: {report.settings.pattern} on {report.settings.sites}",
        columns=columns,
        rows=tuple(rows),
        note=saved,
    )
