"""What one tensor of a checkpoint is: its part of the model, zeros, pattern and stored bytes.

O/I out/in features, G groups of M consecutive columns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from moiety.experts.packing import DTYPES
from moiety.experts.pattern import Pattern
from moiety.experts.unpack import DenseView

GROUPS = ("embeddings", "attention", "ffn", "router", "norms", "head", "other")
GROUP_SIZES = (2, 4, 8, 16)
DENSE = 0.99
_GROUP_OF_PART = (
    ("norms", re.compile(r".*norm.*|ln|ln_.*")),
    ("router", re.compile(r"gate|.*router.*|.*expert_gate")),
    ("head", re.compile(r"lm_head|embed_out|output_projection")),
    ("embeddings", re.compile(r".*embed.*|wte|wpe")),
    ("attention", re.compile(r".*attn.*|.*attention.*")),
    ("ffn", re.compile(r".*mlp.*|.*ffn.*|.*experts?.*|feed_forward|.*moe|fc\d*|w\d")),
)


def group_of(name: str) -> str:
    """The part of a model that a tensor belongs to, one of GROUPS, by the modules it stands in."""
    parts = name.lower().split(".")
    for group, rule in _GROUP_OF_PART:
        if any(rule.fullmatch(part) for part in parts):
            return group
    return "other"


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One tensor of a checkpoint.

    `shape` is the dense one; `dtype` is how its values are stored (bf16, int4, ...) and `bytes`
    what they take on disk with mask and scales; `zeros` counts zero weights. `pattern` is the
    stated one of a packed matrix, else the sparsest N:M that it was pruned to, else the share of
    weights kept, `dense` above 99 %, or `zero`. Zero rows and columns could be cut out.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: str
    packed: bool
    bytes: int
    zeros: int
    pattern: str
    zero_rows: int
    zero_columns: int

    @property
    def weights(self) -> int:
        """How many weights the dense tensor has."""
        return int(torch.Size(self.shape).numel())


def examine(view: DenseView, name: str) -> TensorReport:
    """Read one tensor and describe it."""
    tensor = view[name]
    nonzero = tensor != 0
    stored = view.packed.get(name)
    parts = [part for part in (name, f"{name}_mask", f"{name}_scale") if part in view.raw.files]
    raw = [view.raw[part] for part in parts] if stored else [tensor]
    is_matrix = tensor.dim() > 1 and tensor.numel() > 0
    return TensorReport(
        name=name,
        group=group_of(name),
        shape=tuple(tensor.shape),
        dtype=_dtype_name(raw[0].dtype, packed=stored is not None),
        packed=stored is not None,
        bytes=sum(part.nbytes for part in raw),
        zeros=tensor.numel() - int(nonzero.count_nonzero()),
        pattern=str(stored or found_pattern(nonzero)),
        zero_rows=int((~nonzero.any(-1)).sum()) if is_matrix else 0,
        zero_columns=int((~nonzero.any(-2)).sum()) if is_matrix else 0,
    )


def found_pattern(nonzero: Tensor) -> str:
    """The sparsest pattern that the non-zeros (..., O, I) of a tensor follow; see TensorReport."""
    count = nonzero.numel()
    density = int(nonzero.count_nonzero()) / count if count else 1.0
    if density == 0:
        return "zero"
    if density > DENSE or nonzero.dim() < 2:
        return str(Pattern.dense())
    sizes = [size for size in GROUP_SIZES if nonzero.shape[-1] % size == 0]
    holding = [(kept / size, size, kept) for size in sizes if (kept := _kept(nonzero, size))]
    if not holding:
        return f"{density:.3g}"
    _, size, kept = min(holding)
    return str(Pattern(kept, size))


def _kept(nonzero: Tensor, size: int) -> int:
    """The N of N:size that a tensor was pruned to, 0 for none.

    Some N always is the most of any group, also of one pruned without groups: it counts only if
    most groups that are not zero reach it.
    """
    nonzero_GM = rearrange(nonzero, "... (g m) -> (... g) m", m=size)
    count_G = nonzero_GM.sum(-1, dtype=torch.uint8)
    most = int(count_G.max())
    reached = int((count_G == most).sum())
    return most if most < size and 2 * reached > int(count_G.count_nonzero()) else 0


def patterns_of(tensors: Sequence[TensorReport]) -> str:
    """The patterns of a group's matrices, each once, the most frequent first."""
    patterns = [tensor.pattern for tensor in tensors if len(tensor.shape) > 1]
    return ", ".join(sorted(set(patterns), key=lambda pattern: (-patterns.count(pattern), pattern)))


def _dtype_name(dtype: torch.dtype, *, packed: bool) -> str:
    names = {kind: name for name, kind in DTYPES.items() if packed or kind.is_floating_point}
    return names.get(dtype, str(dtype).removeprefix("torch."))
