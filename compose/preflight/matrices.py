"""Which matrices of a model are pruned, from its configuration alone.

O/I out/in features.
"""

from transformers import PretrainedConfig

from moiety.experts.architecture import Architecture
from moiety.experts.calibrate import decoder_blocks, linears_of


def pruned_matrices(config: PretrainedConfig, sites: str) -> dict[str, tuple[int, int]]:
    """Shape (O, I) of every linear layer that `sites` names in the blocks, by its module's name.

    Raises InputError for an architecture that transformers does not know.
    """
    prefix, blocks = decoder_blocks(Architecture(config).model)
    return {
        f"{prefix}.{number}.{name}": (linear.out_features, linear.in_features)
        for number, block in enumerate(blocks)
        for name, linear in linears_of(block, sites).items()
    }
