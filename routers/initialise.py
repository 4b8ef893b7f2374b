"""Gate weights without training: from statistics to a weight, and the scale of its logits.

T tokens, D model width, W features of a gate, E experts, N sampled tokens, O, D the shape of an
expert's difference to the base (one matrix, or several one above the other).
"""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from moiety.errors import InputError
from moiety.routers.statistics import GateStatistics

SMALLEST_SPREAD, LARGEST_SPREAD = 0.05, 20.0
"""Bounds of the standard deviation of scaled logits: separable domains have no finite best
scale, and a gate this sharp gives the first expert all the weight already."""
ARROW_RANK, ARROW_ROUNDS = 8, 12
LOGISTIC_STEPS = 100


def ridge(statistics: GateStatistics, penalty: float = 1e-2) -> Tensor:
    """Ridge regression from a gate's features to one-hot labels -> fp32 weight_EW.

    W = M (G + λ mean(diag G) I)⁻¹, G the Gram matrix and M the label means, both with every
    label weighing the same (Hoerl & Kennard 1970; as a training-free router: DUME,
    arXiv:2603.29765). The factorisation runs in fp64. The mean row is taken off, which no
    softmax over experts can see and which leaves a low-precision weight more digits. An expert
    without text regresses to 0, as any other expert's does on foreign text.
    Raises InputError for a penalty that is not positive, or labels of fewer than two experts.
    """
    _check_penalty(penalty)
    check_labels(statistics)
    gram_WW = statistics.gram_WW.double().cpu()
    ridge_W = torch.full((len(gram_WW),), float(penalty * gram_WW.diagonal().mean())).double()
    factor_WW = torch.linalg.cholesky(gram_WW + torch.diag(ridge_W))
    weight_WE = torch.cholesky_solve(statistics.sum_EW.double().cpu().T, factor_WW)
    return _centred(weight_WE.T).float()


def logistic(statistics: GateStatistics, penalty: float = 1e-2) -> Tensor:
    """Multinomial logistic regression on the sampled features -> fp32 weight_EW.

    Minimises the cross-entropy to the labels, labels weighing the same, plus
    penalty / 2 · (mean square of a feature) · |W|², by L-BFGS (Liu & Nocedal 1989) from ridge's
    solution at its best scale. Raises InputError as `ridge`, and when a label is not in the
    sample.
    """
    start_EW = ridge(statistics, penalty)
    sample_NW, label_N = statistics.sample_NW, statistics.label_N
    count_E = label_N.bincount(minlength=len(statistics.count_E))
    missing = ((statistics.count_E.cpu() > 0) & (count_E == 0)).nonzero().flatten().tolist()
    if missing:
        raise InputError(
            f"expected sampled features of every label for {statistics.name}, but there are none "
            f"of expert {missing[0]}; collect with sample=4096 or so"
        )
    share_N = (1 / count_E.double())[label_N].float() / int((count_E > 0).sum())
    square = float((share_N @ sample_NW.square()).mean())
    start_EW = start_EW * best_scale(sample_NW @ start_EW.T, label_N)
    weight_EW = start_EW.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_EW], max_iter=LOGISTIC_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        loss_N = cross_entropy(sample_NW @ weight_EW.T, label_N, reduction="none")
        total = share_N @ loss_N + penalty / 2 * square * weight_EW.square().sum()
        total.backward()
        return float(total.detach())

    with torch.enable_grad():
        optimizer.step(loss)
    return _centred(weight_EW.detach())


def centroid(statistics: GateStatistics) -> Tensor:
    """Nearest label mean by cosine, as a linear gate -> fp32 weight_EW.

    Row e is the mean features of label e at unit length, of the true gate inputs and without
    padding; the mean row is taken off as in `ridge`.
    Raises InputError for labels of fewer than two experts.
    """
    check_labels(statistics)
    mean_EW = statistics.sum_EW.double().cpu()
    return _centred(normalize(mean_EW, dim=-1)).float()


def prompts(statistics: GateStatistics) -> Tensor:
    """Label means at unit length and nothing more -> fp32 weight_EW: a control.

    What mergekit-moe's `hidden_avg` does, of statistics that were collected without own routes.
    Raises InputError for labels of fewer than two experts.
    """
    check_labels(statistics)
    return normalize(statistics.sum_EW.double().cpu(), dim=-1).float()


def random(experts: int, width: int, seed: int) -> Tensor:
    """Normal weights of standard deviation 0.02, as stock gates start -> fp32 weight_EW."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((experts, width), generator=generator) * 0.02


def arrow(deltas_EOD: Sequence[Tensor]) -> Tensor:
    """Each expert's direction of largest change, as a gate without text -> fp32 weight_ED.

    Row e is the top right singular vector of delta e (O, D), for what reads the gate's input
    (say [ΔW_gate; ΔW_up]): |x · w_e| is then large for inputs that the expert changes most.
    Needs a router with `score: absolute`. Arrow (Ostapenko et al. 2024, arXiv:2405.11157) takes
    low-rank deltas; full ones are our extension, by randomised subspace iteration (Halko et al.
    2011, arXiv:0909.4061). The same on every call; an expert without changes gets a zero row.
    Raises InputError for deltas of different widths, or with NaN or infinite values.
    """
    if len({delta_OD.shape[-1] for delta_OD in deltas_EOD}) != 1 or any(
        delta_OD.ndim != 2 for delta_OD in deltas_EOD
    ):
        raise InputError(
            "expected one matrix an expert, all of the gate's width, but they are "
            f"{[tuple(delta_OD.shape) for delta_OD in deltas_EOD]}"
        )
    return torch.stack([_top_direction(delta, at) for at, delta in enumerate(deltas_EOD)])


def _top_direction(delta_OD: Tensor, expert: int) -> Tensor:
    delta_OD = delta_OD.detach().float()
    size = float(delta_OD.abs().max())
    if not math.isfinite(size):
        raise InputError(f"expected a finite delta of expert {expert}, but it has NaN or infinity")
    if size == 0.0:
        return torch.zeros(delta_OD.shape[1])
    rank = min(ARROW_RANK, *delta_OD.shape)
    devices = [delta_OD.device] if delta_OD.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        _u, _s, basis_DR = torch.svd_lowrank(delta_OD / size, q=rank, niter=ARROW_ROUNDS)
    top_D = basis_DR[:, 0].cpu()
    return top_D * top_D[top_D.abs().argmax()].sign()


def check_labels(statistics: GateStatistics) -> None:
    """Raise InputError unless two or more experts have text."""
    labels = int((statistics.count_E > 0).sum())
    if labels < 2:
        raise InputError(
            f"expected text of at least two experts for {statistics.name}, but there is text of "
            f"{labels}; give domains with different own experts"
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


def _check_penalty(penalty: float) -> None:
    if not penalty > 0:
        raise InputError(f"penalty must be positive, but it is {penalty}")


def _centred(weight_EW: Tensor) -> Tensor:
    return weight_EW - weight_EW.mean(0)
