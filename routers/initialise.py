"""Gate weights without training: from statistics to a weight, and the scale of its logits.

T tokens, D model width, E experts.
"""

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from moiety.errors import InputError
from moiety.routers.statistics import GateStatistics

SMALLEST_SPREAD, LARGEST_SPREAD = 0.05, 20.0
"""Bounds of the standard deviation of scaled logits: separable domains have no finite best
scale, and a gate this sharp gives the first expert all the weight already."""


def ridge(statistics: GateStatistics, penalty: float = 1e-2) -> Tensor:
    """Ridge regression from gate inputs to one-hot labels -> fp32 weight_ED.

    W = M (G + λ mean(diag G) I)⁻¹, G the Gram matrix and M the label means, both with every
    label weighing the same (Hoerl & Kennard 1970; as a training-free router: DUME,
    arXiv:2603.29765). The factorisation runs in fp64. The mean row is taken off, which no
    softmax over experts can see and which leaves a low-precision weight more digits. An expert
    without text regresses to 0, as any other expert's does on foreign text.
    Raises InputError for a penalty that is not positive, or labels of fewer than two experts.
    """
    if not penalty > 0:
        raise InputError(f"penalty must be positive, but it is {penalty}")
    check_labels(statistics)
    gram_DD = statistics.gram_DD.double().cpu()
    ridge_D = torch.full((len(gram_DD),), float(penalty * gram_DD.diagonal().mean())).double()
    factor_DD = torch.linalg.cholesky(gram_DD + torch.diag(ridge_D))
    weight_DE = torch.cholesky_solve(statistics.sum_ED.double().cpu().T, factor_DD)
    return _centred(weight_DE.T).float()


def centroid(statistics: GateStatistics) -> Tensor:
    """Nearest label mean by cosine, as a linear gate -> fp32 weight_ED.

    Row e is the mean input of label e at unit length (mergekit-moe's `hidden_avg`, but of the
    true gate inputs and without padding); the mean row is taken off as in `ridge`.
    Raises InputError for labels of fewer than two experts.
    """
    check_labels(statistics)
    mean_ED = statistics.sum_ED.double().cpu()
    return _centred(normalize(mean_ED, dim=-1)).float()


def random(experts: int, width: int, seed: int) -> Tensor:
    """Normal weights of standard deviation 0.02, as stock gates start -> fp32 weight_ED."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((experts, width), generator=generator) * 0.02


def check_labels(statistics: GateStatistics, minimum_tokens: int = 1) -> None:
    """Raise InputError unless two or more experts have text, each at least `minimum_tokens`."""
    counts = [int(count) for count in statistics.count_E if count > 0]
    if len(counts) < 2:
        raise InputError(
            f"expected text of at least two experts for {statistics.name}, but there is text of "
            f"{len(counts)}; give domains with different own experts"
        )
    if min(counts) < minimum_tokens:
        expert = statistics.count_E.tolist().index(min(counts))
        raise InputError(
            f"expected at least {minimum_tokens} tokens an expert, but expert {expert} has "
            f"{min(counts)}; give more text or lower minimum_tokens"
        )


def best_scale(logits_TE: Tensor, label_T: Tensor) -> float:
    """Scale s that minimises `label_loss`.

    Temperature scaling (Guo et al. 2017, arXiv:1706.04599, §4.2): the choices stay the same,
    the weights of the chosen experts become calibrated. The spread of the scaled logits is kept
    within fixed bounds. Logits that are all equal give scale 1.
    """
    spread = float((logits_TE - logits_TE.mean(-1, keepdim=True)).double().std(correction=0))
    if spread == 0.0:
        return 1.0
    bounds = (math.log(SMALLEST_SPREAD / spread), math.log(LARGEST_SPREAD / spread))
    found = minimize_scalar(
        lambda log_scale: label_loss(logits_TE, label_T, math.exp(log_scale)),
        bounds=bounds,
        method="bounded",
    )
    return math.exp(found.x)


def label_loss(logits_TE: Tensor, label_T: Tensor, scale: float) -> float:
    """Cross-entropy of softmax(scale · logits) to the labels, in nats, labels weighing the same."""
    loss_T = cross_entropy(logits_TE.double() * scale, label_T, reduction="none")
    weight_T = 1 / label_T.bincount()[label_T].double()
    return float((weight_T * loss_T).sum() / weight_T.sum())


def _centred(weight_ED: Tensor) -> Tensor:
    return weight_ED - weight_ED.mean(0)
