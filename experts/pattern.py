"""What `2:4`, `0.5` and `dense` mean: parse them, choose masks by them, check them.

O out features (rows), I in features (columns), G groups of M consecutive columns.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from moiety.errors import InputError

RANKED_BY_COUNTING = 16


@dataclass(frozen=True)
class Pattern:
    """Which weights of a matrix may be non-zero.

    `Pattern(2, 4)`: at most 2 in each 4 consecutive input columns of a row, the 2:4 of NVIDIA's
    sparse tensor cores (Mishra et al. 2021, arXiv:2104.08378); the first number always counts
    the weights that are *kept*. `Pattern.unstructured(0.5)`: half of all weights, anywhere in
    the matrix. `Pattern.dense()`: all of them.
    """

    kept: int = 0
    group: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.group == 0:
            if self.kept or not 0 < self.share <= 1:
                raise InputError(
                    f"pattern must keep more than 0 and at most all (1) of the weights, "
                    f"but it keeps {self.share:g}"
                )
        elif not 1 <= self.kept < self.group or self.share:
            raise InputError(
                f"pattern must keep at least 1 and fewer than all of a group, "
                f"but it is {self.kept}:{self.group}"
            )

    @classmethod
    def unstructured(cls, density: float) -> "Pattern":
        """Keep this share of a matrix's weights, wherever they are."""
        return cls(share=density)

    @classmethod
    def dense(cls) -> "Pattern":
        """Keep everything."""
        return cls(share=1.0)

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `2:4` (kept:group), `0.5` or `50%` (share kept, anywhere) or `dense`.

        Raises InputError for anything else.
        """
        text = text.strip()
        if text == "dense":
            return cls.dense()
        if match := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text):
            return cls(int(match[1]), int(match[2]) or -1)
        if match := re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", text):
            share = float(match[1]) / (100 if match[2] else 1)
            if 0 < share < 1:
                return cls.unstructured(share)
        raise InputError(
            "pattern must look like 2:4 (kept:group), like 0.5 or 50% (share of weights kept) "
            f"or be dense, but it is {text!r}"
        )

    def __str__(self) -> str:
        if self.group:
            return f"{self.kept}:{self.group}"
        return "dense" if self.is_dense else f"{self.share:.6g}"

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self.share == 1

    @property
    def density(self) -> float:
        """Share of weights kept."""
        return self.kept / self.group if self.group else self.share

    def kept_columns(self, in_features: int) -> int:
        """How many values a row of `in_features` columns keeps; for a density, on average."""
        self.check_width(in_features)
        if self.group:
            return in_features // self.group * self.kept
        return max(1, round(self.share * in_features))

    def values_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of a matrix's kept values: (O, K) for N:M, where every row keeps K, else (O·K,)."""
        kept = self.kept_columns(in_features)
        return (out_features, kept) if self.group else (out_features * kept,)

    def check_width(self, in_features: int) -> None:
        """Raise InputError unless rows of `in_features` columns fall into whole groups."""
        if self.group and in_features % self.group:
            raise InputError(
                f"pattern {self} needs a multiple of {self.group} input columns, "
                f"but the matrix has {in_features}; leave this matrix dense"
            )

    def mask(self, score_OI: Tensor, within: Literal["row", "matrix"] = "row") -> Tensor:
        """Boolean mask of the highest scores, exactly as many as the pattern keeps.

        N:M compares scores within each group. A density compares them `within` each row (so
        that every row keeps as many) or the whole matrix. Ties go to the lower column, then row,
        so the same scores always give the same mask.
        """
        self.check_width(score_OI.shape[-1])
        if self.is_dense:
            return torch.ones_like(score_OI, dtype=torch.bool)
        if self.group:
            score_OGM = rearrange(score_OI, "... (g m) -> ... g m", m=self.group)
            return rearrange(_highest_of_group(score_OGM, self.kept), "... g m -> ... (g m)")
        kept = self.kept_columns(score_OI.shape[-1])
        if within == "row":
            return highest(score_OI, kept)
        return highest(score_OI.reshape(1, -1), kept * score_OI.shape[0]).view_as(score_OI)

    def holds(self, weight_OI: Tensor) -> bool:
        """Whether no group of a row (or the matrix) has more non-zeros than are kept."""
        if self.group == 0:
            kept = self.kept_columns(weight_OI.shape[-1]) * weight_OI.shape[0]
            return int(weight_OI.count_nonzero()) <= kept
        if weight_OI.shape[-1] % self.group:
            return False
        nonzero_OGM = rearrange(weight_OI != 0, "... (g m) -> ... g m", m=self.group)
        return bool((nonzero_OGM.sum(-1) <= self.kept).all())


def highest(score_OI: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` highest scores of every row; ties go to the lower column."""
    score_OI = score_OI.float()
    least_O1 = score_OI.kthvalue(score_OI.shape[-1] - kept + 1, dim=-1, keepdim=True).values
    mask_OI = score_OI > least_O1
    tied_OI = score_OI == least_O1
    missing_O1 = kept - mask_OI.sum(-1, keepdim=True)
    return mask_OI | (tied_OI & (tied_OI.cumsum(-1) <= missing_O1))


def _highest_of_group(score_OGM: Tensor, kept: int) -> Tensor:
    group = score_OGM.shape[-1]
    if group > RANKED_BY_COUNTING:
        order_OGM = score_OGM.sort(dim=-1, descending=True, stable=True).indices
        mask_OGM = torch.zeros_like(score_OGM, dtype=torch.bool)
        return mask_OGM.scatter_(-1, order_OGM[..., :kept], True)
    mask_OGM = torch.empty_like(score_OGM, dtype=torch.bool)
    for column in range(group):
        own_OG1 = score_OGM[..., column : column + 1]
        above_OG = (score_OGM[..., :column] >= own_OG1).sum(-1)
        above_OG += (score_OGM[..., column + 1 :] > own_OG1).sum(-1)
        mask_OGM[..., column] = above_OG < kept
    return mask_OGM
