"""What `2:4` means: parse it, choose masks by it, check it.

O out features (rows), I in features (columns), G groups of M consecutive columns.
"""

import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from moiety.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """At most `kept` non-zeros in each `group` consecutive input columns of a row.

    `Pattern(2, 4)` is the 2:4 of NVIDIA's sparse tensor cores (Mishra et al. 2021,
    arXiv:2104.08378). The first number always counts the weights that are *kept*.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group:
            raise InputError(
                f"pattern must keep at least 1 and fewer than all of a group, "
                f"but it is {self.kept}:{self.group}"
            )

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `"2:4"`; raises InputError for anything that is not `N:M` with N < M."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if match is None:
            raise InputError(f"pattern must look like 2:4 (kept:group), but it is {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def density(self) -> float:
        """Share of weights kept."""
        return self.kept / self.group

    def kept_columns(self, in_features: int) -> int:
        """How many values a row of `in_features` columns keeps."""
        self.check_width(in_features)
        return in_features // self.group * self.kept

    def check_width(self, in_features: int) -> None:
        """Raise InputError unless rows of `in_features` columns fall into whole groups."""
        if in_features % self.group:
            raise InputError(
                f"pattern {self} needs a multiple of {self.group} input columns, "
                f"but the matrix has {in_features}; leave this matrix dense"
            )

    def mask(self, score_OI: Tensor) -> Tensor:
        """Boolean mask of the highest scores of every group, exactly `kept` in each.

        Ties go to the lower column, so the same scores always give the same mask.
        """
        self.check_width(score_OI.shape[-1])
        score_OGM = rearrange(score_OI, "... (g m) -> ... g m", m=self.group)
        order_OGM = score_OGM.sort(dim=-1, descending=True, stable=True).indices
        mask_OGM = torch.zeros_like(score_OGM, dtype=torch.bool)
        mask_OGM.scatter_(-1, order_OGM[..., : self.kept], True)
        return rearrange(mask_OGM, "... g m -> ... (g m)")

    def holds(self, weight_OI: Tensor) -> bool:
        """Whether no group of a row has more than `kept` non-zeros."""
        if weight_OI.shape[-1] % self.group:
            return False
        nonzero_OGM = rearrange(weight_OI != 0, "... (g m) -> ... g m", m=self.group)
        return bool((nonzero_OGM.sum(-1) <= self.kept).all())
