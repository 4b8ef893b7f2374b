"""What must hold of a composite whatever its weights, checked again on the user's own models."""

from pathlib import Path

from moiety.compose.builder import Builder
from moiety.compose.ensemble.builder import EnsembleBuilder
from moiety.compose.invariants.ensembles import of_ensemble
from moiety.compose.invariants.merges import of_merge
from moiety.compose.invariants.routes import of_routes
from moiety.compose.invariants.statement import Invariant, opened_again, saved_again, text_of
from moiety.compose.merged import MergeBuilder
from moiety.compose.routing import RoutingBuilder
from moiety.errors import InvariantError
from moiety.experts.delta import is_task_vector
from moiety.progress import SILENT, Progress

__all__ = ["Invariant", "check_invariants"]


def check_invariants(
    builder: Builder, folder: Path, progress: Progress = SILENT
) -> list[Invariant]:
    """Every invariant of the composite in `folder`, computed in fp32.

    The pattern of a merge was verified matrix by matrix as it was written. Raises InvariantError
    that names what does not hold.
    """
    ids_BS = text_of(builder)
    found: list[Invariant] = []
    if isinstance(builder, RoutingBuilder):
        found = of_routes(builder, folder, ids_BS, progress)
    elif isinstance(builder, EnsembleBuilder):
        found = of_ensemble(builder, folder, ids_BS)
    elif isinstance(builder, MergeBuilder):
        found = of_merge(builder, folder, ids_BS)
    again = opened_again if is_task_vector(folder) else saved_again
    found.append(again(folder, ids_BS))
    broken = [invariant for invariant in found if not invariant.holds]
    if broken:
        raise InvariantError(
            "; ".join(
                f"expected that {one.statement}, within {one.allowed:g} of the largest logit, but "
                f"they differ by {one.difference:.2g}"
                for one in broken
            )
        )
    return found
