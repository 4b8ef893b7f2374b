"""What gates of different architectures give, read as one thing: logits, weights, experts.

T tokens, E experts, A active experts.
"""

from typing import Any

import torch
from torch import Tensor

from moiety.errors import InputError

JETMOE_OUTPUTS = 5


def read_route(outputs: Any, experts: int, active: int) -> tuple[Tensor, Tensor, Tensor]:
    """A gate's `(logits_TE, weights_TA, experts_TA)`, experts as the gate chose them.

    Most gates of transformers give just that, some more after it. Llama 4 gives scores with 0 for
    experts that were not chosen, and logits; JetMoE the tokens sorted by expert. Raises InputError
    for others.
    """
    if _is_triple(outputs, experts):
        return outputs[:3]
    if _is_scattered(outputs, experts):
        scores_TE, logits_TE = outputs
        weights_TA, experts_TA = scores_TE.topk(active, dim=-1)
        return logits_TE, weights_TA, experts_TA
    if isinstance(outputs, tuple) and len(outputs) == JETMOE_OUTPUTS:
        return _unsorted(*outputs)
    raise InputError(
        f"expected a gate that gives logits, weights and experts, but it gives {_told(outputs)}; "
        "moiety cannot read routes of this architecture yet"
    )


def with_route(outputs: Any, weights_TA: Tensor, experts_TA: Tensor) -> Any:
    """A gate's outputs with another route; InputError where the architecture does not allow it."""
    if isinstance(outputs, tuple) and _is_triple(outputs, outputs[0].shape[-1]):
        return outputs[0], weights_TA, experts_TA, *outputs[3:]
    if isinstance(outputs, tuple) and len(outputs) == 2:
        scores_TE, logits_TE = outputs
        return torch.zeros_like(scores_TE).scatter(1, experts_TA, weights_TA), logits_TE
    raise InputError(
        f"expected a gate whose route can be replaced, but it gives {_told(outputs)}; "
        "routes of this architecture can be traced, not forced"
    )


def _is_triple(outputs: Any, experts: int) -> bool:
    return (
        isinstance(outputs, tuple)
        and len(outputs) >= 3
        and all(isinstance(part, Tensor) and part.ndim == 2 for part in outputs[:3])
        and outputs[0].shape[1] == experts
        and not outputs[2].is_floating_point()
        and outputs[1].shape == outputs[2].shape
    )


def _is_scattered(outputs: Any, experts: int) -> bool:
    return (
        isinstance(outputs, tuple)
        and len(outputs) == 2
        and all(isinstance(part, Tensor) and part.shape[-1] == experts for part in outputs)
    )


def _unsorted(
    order_N: Tensor, _token_N: Tensor, weight_N: Tensor, size_E: Any, logits_TE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Routes that come sorted by expert, `size_E` of each, `order_N` their places (T x A)."""
    tokens = len(logits_TE)
    size_E = torch.as_tensor(size_E, device=logits_TE.device)
    sorted_N = torch.arange(len(size_E), device=logits_TE.device).repeat_interleave(size_E)
    experts_N, weights_N = torch.empty_like(sorted_N), torch.empty_like(weight_N)
    experts_N[order_N], weights_N[order_N] = sorted_N, weight_N
    return logits_TE, weights_N.view(tokens, -1), experts_N.view(tokens, -1)


def _told(outputs: Any) -> str:
    parts = outputs if isinstance(outputs, tuple | list) else (outputs,)
    told = [str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    return ", ".join(told)
