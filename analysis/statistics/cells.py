"""Which experts a domain uses more or less than other domains, one by one.

M documents, D domains, L routed layers, E experts, P replicates.
"""

import numpy
from scipy.stats import false_discovery_control

from moiety.analysis.results.parts import Cells
from moiety.analysis.statistics.measures import Floats
from moiety.analysis.statistics.resampling import SAME, Documents, Draws

LEVEL = 0.05


def cells(documents: Documents, draws: Draws) -> Cells:
    """Every domain and expert of every layer against permuted documents, see `Cells`."""
    observed_LDE: Floats | None = None
    extreme_LDE = numpy.zeros(())
    for table_PLDE in documents.relabelled(draws.labels(documents.domain_M)):
        difference_PLDE = _difference(table_PLDE)
        if observed_LDE is None:
            observed_LDE = difference_PLDE[0]
        reached = numpy.abs(difference_PLDE) >= numpy.abs(observed_LDE) - SAME
        extreme_LDE = extreme_LDE + reached.sum(0)
    assert observed_LDE is not None
    p_DLE = (extreme_LDE / (1 + draws.permutations)).transpose(1, 0, 2)
    adjusted_DLE = false_discovery_control(p_DLE.ravel()).reshape(p_DLE.shape)
    return Cells(
        difference_DLE=observed_LDE.transpose(1, 0, 2),
        p_DLE=p_DLE,
        adjusted_DLE=adjusted_DLE,
        tested=p_DLE.size,
        found=int((adjusted_DLE <= LEVEL).sum()),
    )


def _difference(table_PLDE: Floats) -> Floats:
    share_PLDE = table_PLDE / numpy.maximum(table_PLDE.sum(-1, keepdims=True), 1)
    return share_PLDE - share_PLDE.mean(-2, keepdims=True)
