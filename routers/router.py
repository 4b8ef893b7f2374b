"""The router of our own composites: a softmax over experts, the best few of them kept.

T tokens, D model width, E experts, A active experts.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Router(nn.Module):
    """Routes tokens by `softmax(x @ weightᵀ)`, the `top_k` largest scaled to sum to 1.

    What stock gates of Mixtral do (Jiang et al. 2024, arXiv:2401.04088); `weight` (E, D) is all
    there is to learn. Zeros prefer no expert.
    """

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(experts, width))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E), and weights and experts (T, A) in fp32 and int64."""
        logits_TE = linear(hidden_TD, self.weight.to(hidden_TD.dtype))
        shares_TE = logits_TE.float().softmax(-1)
        weights_TA, experts_TA = shares_TE.topk(self.top_k, dim=-1)
        return logits_TE, weights_TA / weights_TA.sum(-1, keepdim=True), experts_TA

    def extra_repr(self) -> str:
        """Sizes, shown by print(model)."""
        experts, width = self.weight.shape
        return f"width={width}, experts={experts}, top_k={self.top_k}"
