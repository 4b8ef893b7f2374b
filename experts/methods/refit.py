"""Masked least-squares refit: the best values for a given mask, by conjugate gradients.

O out features, I in features, R leading directions, S pairs of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moiety.experts.methods.problem import check_finite, check_problem

STEPS = 8
LEADING = 64
OVERSAMPLING = 8
POWER_STEPS = 3
LEAST_REST = 0.1
CHUNK_ELEMENTS = 1 << 22
SPENT_ROW = 1e-10
SPENT_CHUNK = 1e-4
ROUGH_FROM = 1024


def refit(
    weight_OI: Tensor,
    pruned_OI: Tensor,
    gram_II: Tensor,
    steps: int = STEPS,
    mask_OI: Tensor | None = None,
) -> Tensor:
    """Move the kept values of `pruned_OI` to minimise `tr((W-P) G (W-P)ᵀ)`, zeros staying zero.

    Kept are the entries where `mask_OI` (O, I) is true, or else where `pruned_OI` is not zero.
    At most `steps` steps of conjugate gradients for all rows of a chunk at once, one O x I x I
    product each and one before; a chunk stops early once a step gains its rows less than 1e-4 of
    their error. No row gets worse: steps are exact line searches, and one that is lost in
    rounding (it would gain less than 1e-10 of the row's energy, or more than its error) is not
    taken. On CPUs whose AMX units multiply bf16 several times faster than fp32, directions are
    multiplied in bf16 from 1024 inputs on, G's leading directions in fp32 beside them; rows whose
    error, computed anew in fp32, turns out to have grown stay as they came.

    Masked conjugate gradients are those of ALPS (Meng et al. 2024, arXiv:2406.07831, algorithm 2)
    for any mask. The preconditioner is our own: G's 64 leading directions and its diagonal,
    restricted to each row's mask. Where a few directions carry most of the inputs' energy, eight
    steps get what dozens of diagonally preconditioned ones do. Raises InputError for dtypes or
    shapes that do not match and for NaN activations.
    """
    check_problem(weight_OI, gram_II)
    check_finite(gram_II)
    if not steps:
        return pruned_OI.clone()
    inputs = _Inputs.of(gram_II)
    rows = max(1, CHUNK_ELEMENTS // weight_OI.shape[1])
    value_OI = torch.empty_like(pruned_OI)
    for start in range(0, len(weight_OI), rows):
        chunk = slice(start, start + rows)
        kept_OI = pruned_OI[chunk] != 0 if mask_OI is None else mask_OI[chunk]
        kept_OI = kept_OI.to(weight_OI.dtype)
        value_OI[chunk] = _descend(
            weight_OI[chunk], pruned_OI[chunk] * kept_OI, kept_OI, inputs, steps
        )
    return value_OI


def _descend(
    weight_OI: Tensor, value_OI: Tensor, kept_OI: Tensor, inputs: "_Inputs", steps: int
) -> Tensor:
    """Conjugate gradients on a chunk of rows from `value_OI`, which is used up."""
    precondition = inputs.curvature.inverse(kept_OI)
    start_OI = value_OI.clone() if inputs.is_rough else value_OI
    least_O1 = SPENT_ROW * (weight_OI.square() @ inputs.gram_II.diagonal())[:, None]
    image_OI, residual_OI = torch.empty_like(value_OI), torch.empty_like(value_OI)
    direction_OI, scaled_OI = torch.zeros_like(value_OI), torch.empty_like(value_OI)
    energy_O1 = torch.zeros_like(least_O1)

    def exact_errors() -> Tensor:
        torch.sub(weight_OI, value_OI, out=image_OI)
        torch.mm(image_OI, inputs.gram_II, out=residual_OI)
        return _dot(image_OI, residual_OI)

    start_O1 = error_O1 = exact_errors()
    residual_OI.mul_(kept_OI)
    for _ in range(steps):
        precondition(residual_OI, scaled_OI)
        previous_O1, energy_O1 = energy_O1, _dot(residual_OI, scaled_OI)
        direction_OI.mul_(_ratio(energy_O1, previous_O1)).add_(scaled_OI)
        inputs.product(direction_OI, image_OI)
        image_OI.mul_(kept_OI)
        length_O1 = _ratio(energy_O1, _dot(direction_OI, image_OI))
        gain_O1 = length_O1 * energy_O1
        sound_O1 = (gain_O1 > least_O1) & (gain_O1 <= error_O1)
        length_O1 = torch.where(sound_O1, length_O1, 0)
        value_OI.add_(torch.mul(direction_OI, length_O1, out=scaled_OI))
        residual_OI.sub_(torch.mul(image_OI, length_O1, out=scaled_OI))
        error_O1 = error_O1 - length_O1 * energy_O1
        if float(_ratio(gain_O1, error_O1).mean()) < SPENT_CHUNK:
            break
    if inputs.is_rough:
        value_OI = torch.where(exact_errors() > start_O1, start_OI, value_OI)
    return value_OI


def _dot(left_OI: Tensor, right_OI: Tensor) -> Tensor:
    return torch.linalg.vecdot(left_OI, right_OI)[:, None]


def _ratio(numerator_O1: Tensor, denominator_O1: Tensor) -> Tensor:
    return torch.where(denominator_O1 > 0, numerator_O1 / denominator_O1, 0)


@dataclass(frozen=True)
class _Inputs:
    """The Gram matrix, what preconditions it, and `rough_II`, most of it in bf16 where that pays.

    `rough_II` is of inputs scaled to unit norm (`scale_I`) and without their leading directions
    (`lead_IR`, scaled back), so that neither outlier channels nor what all inputs have in common
    set the rounding of the rest.
    """

    gram_II: Tensor
    curvature: "_Curvature"
    scale_I: Tensor
    lead_IR: Tensor
    rough_II: Tensor | None

    @classmethod
    def of(cls, gram_II: Tensor) -> "_Inputs":
        scale_I = torch.where(gram_II.diagonal() > 0, gram_II.diagonal(), 1).sqrt()
        lead_IR = _leading(gram_II, scale_I)
        rough_II = None
        if len(gram_II) >= ROUGH_FROM and _has_fast_bf16(gram_II.device):
            unit_II = (gram_II / scale_I).div_(scale_I[:, None])
            rough_II = unit_II.addmm_(lead_IR, lead_IR.T, alpha=-1).bfloat16()
        curvature = _Curvature.of(lead_IR, gram_II.diagonal())
        return cls(gram_II, curvature, scale_I, scale_I[:, None] * lead_IR, rough_II)

    @property
    def is_rough(self) -> bool:
        """Whether `product` rounds its factors to bf16."""
        return self.rough_II is not None

    def product(self, direction_OI: Tensor, image_OI: Tensor) -> None:
        """Write directions times the Gram matrix into `image_OI`."""
        if self.rough_II is None:
            torch.mm(direction_OI, self.gram_II, out=image_OI)
            return
        narrow_OI = torch.mul(direction_OI, self.scale_I, out=image_OI).bfloat16()
        image_OI.copy_(narrow_OI @ self.rough_II).mul_(self.scale_I)
        image_OI.addmm_(direction_OI @ self.lead_IR, self.lead_IR.T)


def _has_fast_bf16(device: torch.device) -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class _Curvature:
    """`G ≈ S (D + F Fᵀ) S`: S the diagonal's root, F leading eigenvectors, D what they leave.

    Kept as `rest_I`, the diagonal of (S D S)⁻¹; `tall_IR`, S⁻¹ D⁻¹ F; and `product_IS`, the
    products of columns of F and D⁻¹ F, the lower triangle of all pairs.
    """

    rest_I: Tensor
    tall_IR: Tensor
    product_IS: Tensor

    @classmethod
    def of(cls, factor_IR: Tensor, diagonal_I: Tensor) -> "_Curvature":
        scale_I1 = torch.where(diagonal_I > 0, diagonal_I.rsqrt(), 0)[:, None]
        left_I1 = 1 - factor_IR.square().sum(1, keepdim=True)
        left_I1.clamp_(min=max(LEAST_REST * float(left_I1.mean()), 1e-4))
        first_S, second_S = _lower_triangle(factor_IR)
        product_IS = factor_IR[:, first_S] * (factor_IR / left_I1)[:, second_S]
        return cls((scale_I1.square() / left_I1)[:, 0], scale_I1 / left_I1 * factor_IR, product_IS)

    def inverse(self, kept_OI: Tensor) -> Callable[[Tensor, Tensor], object]:
        """The inverse of each row's kept part, by Woodbury's identity.

        A function of (O, I) that writes into a second (O, I).
        """
        leading = self.tall_IR.shape[1]
        small_ORR = kept_OI.new_zeros(len(kept_OI), leading, leading)
        first_S, second_S = _lower_triangle(self.tall_IR)
        small_ORR[:, first_S, second_S] = kept_OI @ self.product_IS
        small_ORR.diagonal(dim1=1, dim2=2).add_(1)
        lower_ORR = torch.linalg.cholesky(small_ORR)
        unit_ORR = torch.eye(leading).to(lower_ORR).expand_as(lower_ORR)
        root_ORR = torch.linalg.solve_triangular(lower_ORR, unit_ORR, upper=False)

        def apply(residual_OI: Tensor, scaled_OI: Tensor) -> None:
            inner_OR1 = root_ORR @ (residual_OI @ self.tall_IR)[..., None]
            inner_OR = (root_ORR.mT @ inner_OR1)[..., 0]
            torch.mul(residual_OI, self.rest_I, out=scaled_OI)
            scaled_OI.addmm_(inner_OR, self.tall_IR.T, alpha=-1).mul_(kept_OI)

        return apply


def _leading(gram_II: Tensor, scale_I: Tensor) -> Tensor:
    """Leading eigenvectors of the scaled matrix times the roots of their eigenvalues (I, R).

    By subspace iteration.
    """
    width = len(gram_II)
    leading = min(LEADING, width // 4)
    generator = torch.Generator().manual_seed(0)
    start_IR = torch.randn(width, min(width, leading + OVERSAMPLING), generator=generator)
    basis_IR = start_IR.to(gram_II)

    def product(basis_IR: Tensor) -> Tensor:
        return gram_II @ (basis_IR / scale_I[:, None]) / scale_I[:, None]

    for _ in range(POWER_STEPS):
        basis_IR = torch.linalg.qr(product(basis_IR)).Q
    value_R, vector_RR = torch.linalg.eigh(basis_IR.T @ product(basis_IR))
    kept = slice(len(value_R) - leading, None)
    return basis_IR @ vector_RR[:, kept] * value_R[kept].clamp_min(0).sqrt()


def _lower_triangle(matrix_IR: Tensor) -> Tensor:
    leading = matrix_IR.shape[1]
    return torch.tril_indices(leading, leading, device=matrix_IR.device)
