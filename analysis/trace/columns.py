"""Rows of a trace from what a model and its gates did with a batch of windows.

W windows, C context length, T tokens (W x C flattened, padding included), L routed layers,
A active experts, E experts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from moiety.analysis.trace.pieces import Pieces
from moiety.analysis.trace.watching import Watching
from moiety.errors import InputError
from moiety.routers import Gate, Route
from moiety.scoring import token_losses
from moiety.text import Windows


@dataclass(frozen=True)
class LayerRoutes:
    """What one gate chose: best weight first, entropy of its softmax in nats."""

    weights_TA: Tensor
    experts_TA: Tensor
    entropy_T: Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch's tokens as they were fed: which are kept, their phase (0 prefill, 1 decode), loss.

    `loss_WC` is the nats of predicting each token from those before it, NaN where unknown.
    """

    ids_WC: Tensor
    kept_WC: Tensor
    phase_WC: Tensor
    loss_WC: Tensor


class Forward:
    """Reads batches with one plain forward pass each."""

    def __init__(self, model: Any, watching: Watching) -> None:
        self._model = model
        self._watching = watching
        self._device = model.get_input_embeddings().weight.device

    def layers(self) -> Sequence[Gate]:
        """The gates whose routes are given."""
        return self._watching.gates

    def __call__(self, batch: Windows) -> tuple[Tokens, list[LayerRoutes]]:
        """The batch's tokens and every gate's routes of them."""
        longest = int(batch.mask_WC.sum(1).max())
        ids_WC, mask_WC = batch.ids_WC[:, :longest], batch.mask_WC[:, :longest]
        routes: list[Route] = []
        with self._watching.watch(routes.append):
            logits_WCV = self._model(
                input_ids=ids_WC.to(self._device),
                attention_mask=mask_WC.to(self._device),
                use_cache=False,
            ).logits
        routes = in_order(routes, self._watching.gates, ids_WC.numel())
        kept_WC = mask_WC.bool()
        losses_WC = token_losses(logits_WCV, ids_WC, kept_WC).cpu()
        losses_WC[:, 0] = torch.nan
        phase_WC = torch.zeros_like(ids_WC, dtype=torch.int32)
        tokens = Tokens(ids_WC=ids_WC, kept_WC=kept_WC, phase_WC=phase_WC, loss_WC=losses_WC)
        return tokens, [layer_routes(route) for route in routes]


def in_order(routes: Sequence[Route], gates: Sequence[Gate], tokens: int) -> list[Route]:
    """Routes of one forward pass in the order of the gates.

    Raises InputError unless each gate routed every token once, with weights of at least 0.
    """
    routes = sorted(routes, key=lambda route: route.layer)
    if [route.layer for route in routes] != [gate.layer for gate in gates] or any(
        route.experts_TA.shape[0] != tokens for route in routes
    ):
        raise InputError(
            f"expected each of the {len(gates)} gates to route every token of a batch once, "
            f"but layers {[route.layer for route in routes]} were seen; "
            "pass a model that runs all its layers on one process"
        )
    for route, gate in zip(routes, gates, strict=True):
        if not bool(route.weights_TA.amin() >= 0):
            raise InputError(
                f"expected {gate.name} to give weights of at least 0, but it gives "
                f"{float(route.weights_TA.amin()):g}; statistics of routes have no meaning then"
            )
    return routes


def layer_routes(route: Route) -> LayerRoutes:
    """A gate's routes on the CPU, sorted by weight."""
    weights_TA, experts_TA = route.weights_TA.float(), route.experts_TA
    if bool((weights_TA.diff(dim=-1) > 0).any()):
        weights_TA, order_TA = weights_TA.sort(stable=True, dim=-1, descending=True)
        experts_TA = experts_TA.gather(-1, order_TA)
    entropy_T = torch.special.entr(_probabilities(route.logits_TE.float())).sum(-1)
    return LayerRoutes(weights_TA.cpu(), experts_TA.to(torch.int16).cpu(), entropy_T.cpu())


def _probabilities(logits_TE: Tensor) -> Tensor:
    """The softmax of a gate's logits; some gates (Gemma 4) give that in their place."""
    sums_T = logits_TE.sum(-1)
    if bool((logits_TE.amin() >= 0) & torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-2)):
        return logits_TE
    return logits_TE.softmax(-1)


def to_columns(
    tokens: Tokens,
    layers: Sequence[LayerRoutes],
    document_W: Tensor,
    window_W: Tensor,
    pieces: Pieces,
) -> dict[str, Any]:
    """The columns of `routes.parquet`, padding left out, but for the domain."""
    kept_WC, kept_T = tokens.kept_WC, tokens.kept_WC.flatten()
    position_WC = kept_WC.int().cumsum(1) - 1

    def cells(values_WC: Tensor) -> NDArray[Any]:
        values_T = values_WC.expand_as(kept_WC)[kept_WC].numpy()
        return values_T if values_WC.is_floating_point() else values_T.astype(numpy.int32)

    weights = rearrange([layer.weights_TA[kept_T] for layer in layers], "L T A -> T (L A)")
    experts = rearrange([layer.experts_TA[kept_T] for layer in layers], "L T A -> T (L A)")
    return {
        "document": cells(document_W[:, None]),
        "window": cells(window_W[:, None]),
        "position": cells(position_WC),
        "token_id": cells(tokens.ids_WC),
        "text": [
            piece
            for ids_C, kept_C in zip(tokens.ids_WC, kept_WC, strict=True)
            for piece in pieces(ids_C[kept_C].tolist())
        ],
        "phase": cells(tokens.phase_WC),
        "loss": cells(tokens.loss_WC),
        "experts": experts.numpy(),
        "weights": weights.numpy(),
        "entropy": torch.stack([layer.entropy_T[kept_T] for layer in layers], 1).numpy(),
    }
