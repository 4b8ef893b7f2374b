"""Look into models without loading one: sparsity, patterns, bytes, drift from their base."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moiety.errors import InputError
from moiety.experts.anatomy import GROUPS, TensorReport, examine, patterns_of
from moiety.experts.drift import ALL, Drift, drift
from moiety.experts.unpack import DenseView, dense_view
from moiety.progress import SILENT, Progress

Row = tuple[str, ...]
ABSENT = "\N{EN DASH}"
GROUP_COLUMNS = ("group", "tensors", "weights", "zeros", "pattern", "bytes", "bits a weight")
TENSOR_COLUMNS = (
    "tensor",
    "shape",
    "stored as",
    "zeros",
    "pattern",
    "zero rows",
    "zero columns",
    "bytes",
)
DRIFT_COLUMNS = ("group", "relative drift", "tensors equal", "weights unchanged")


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """The tensors of one part of a model together; `patterns` are those of its matrices."""

    group: str
    tensors: int
    weights: int
    zeros: int
    patterns: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One model, tensor by tensor."""

    model: str
    tensors: list[TensorReport]

    @property
    def groups(self) -> list[GroupReport]:
        """Totals of every part that the model has, then of `all`."""
        parts = {
            group: [tensor for tensor in self.tensors if tensor.group == group] for group in GROUPS
        }
        parts[ALL] = self.tensors
        return [_group(group, tensors) for group, tensors in parts.items() if tensors]

    def group_rows(self) -> list[Row]:
        """Cells of a table with GROUP_COLUMNS."""
        return [
            (
                group.group,
                f"{group.tensors:,}",
                f"{group.weights:,}",
                f"{group.zeros / max(1, group.weights):.1%}",
                group.patterns or ABSENT,
                f"{group.bytes:,}",
                f"{8 * group.bytes / max(1, group.weights):.2f}",
            )
            for group in self.groups
        ]

    def tensor_rows(self) -> list[Row]:
        """Cells of a table with TENSOR_COLUMNS."""
        return [
            (
                tensor.name,
                "x".join(str(size) for size in tensor.shape),
                f"{tensor.dtype}, packed" if tensor.packed else tensor.dtype,
                f"{tensor.zeros / max(1, tensor.weights):.1%}",
                tensor.pattern,
                f"{tensor.zero_rows:,}",
                f"{tensor.zero_columns:,}",
                f"{tensor.bytes:,}",
            )
            for tensor in self.tensors
        ]


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """Every model, and with a base the drift of the others from it."""

    models: list[ModelReport]
    drift: Drift | None = None

    def drift_rows(self, model: str) -> list[Row]:
        """Cells of a table with DRIFT_COLUMNS for one finetune; none without a base."""
        found = [own for own in (self.drift.models if self.drift else []) if own.model == model]
        return [
            (
                group.group,
                ABSENT if group.relative is None else f"{group.relative:.2%}",
                f"{group.equal_tensors} of {group.tensors}",
                f"{group.unchanged:.1%}",
            )
            for own in found
            for group in own.groups
        ]

    def agreement_rows(self) -> tuple[Row, list[Row]]:
        """Columns and cells of a table of cosines: a row a pair of finetunes, a column a group."""
        agreements = self.drift.agreements if self.drift else []
        groups = list(dict.fromkeys(agreement.group for agreement in agreements))
        cells: dict[tuple[str, str], dict[str, float | None]] = {}
        for agreement in agreements:
            pair = cells.setdefault((agreement.first, agreement.second), {})
            pair[agreement.group] = agreement.cosine
        rows = [
            (f"{first} and {second}", *(_cosine(pair.get(group)) for group in groups))
            for (first, second), pair in cells.items()
        ]
        return ("task vectors of", *groups), rows

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form, with the groups' totals."""
        values = asdict(self)
        for model, report in zip(values["models"], self.models, strict=True):
            model["groups"] = [asdict(group) for group in report.groups]
        return values


def inspect(
    models: Sequence[str | Path], base: str | Path | None = None, progress: Progress = SILENT
) -> InspectReport:
    """Describe models (folders or hub ids, dense or packed) and their drift from `base`.

    Tensors are read one at a time. The base is described first, whether it is among `models` or
    not. The drift of a packed model includes what pruning and rounding moved. Raises InputError
    when a model cannot be read; tensors that only some models have, or in other shapes, are
    listed.
    """
    given = [*models] if base is None else [base, *models]
    names: list[str] = list(dict.fromkeys(str(model) for model in given))
    if not names:
        raise InputError("expected at least one model, but none was given; give a folder or hub id")
    views = {name: dense_view(name) for name in names}
    reports = [_model_report(name, view, progress) for name, view in views.items()]
    if base is None:
        return InspectReport(models=reports)
    finetunes = [(name, view) for name, view in views.items() if name != str(base)]
    found = drift((str(base), views[str(base)]), finetunes, progress)
    return InspectReport(models=reports, drift=found)


def _model_report(name: str, view: DenseView, progress: Progress) -> ModelReport:
    names = progress.track(view, f"inspect {name}", len(view))
    return ModelReport(model=name, tensors=[examine(view, tensor) for tensor in names])


def _group(group: str, tensors: Sequence[TensorReport]) -> GroupReport:
    return GroupReport(
        group=group,
        tensors=len(tensors),
        weights=sum(tensor.weights for tensor in tensors),
        zeros=sum(tensor.zeros for tensor in tensors),
        patterns=patterns_of(tensors),
        bytes=sum(tensor.bytes for tensor in tensors),
    )


def _cosine(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"
