"""When an op may be called without torch's dispatcher, whose way is longer than a small product.

Through it and back into Python takes 15 us with all caches warm and 50 us between other products,
as long as a token takes with a matrix of 2 MB. What is looked up here is kept at hand: torch's
namespaces are large, and one look into them costs a microsecond when they are out of the caches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def _watchers() -> tuple[Any, Any, Any, Any] | None:
    """What torch does not document, or None where a version lacks it."""
    own = vars(torch._C)
    try:
        return (
            own["_len_torch_dispatch_stack"],
            own["_len_torch_function_stack"],
            own["_functorch"].peek_interpreter_stack,
            own["_get_tracing_state"],
        )
    except (KeyError, AttributeError):
        return None


_WATCHERS = _watchers()


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing but an op's result is wanted: no gradient, graph, trace, mode or profile.

    And whether the tensors have it: those that only have shapes (meta) or that stand for other
    bytes than theirs (lazily negated ones, zeros without memory) do not. No where torch cannot be
    asked.
    """
    if _is_compiling() or _WATCHERS is None or profiler._is_profiler_enabled:
        return False
    dispatching, overriding, transforming, tracing = _WATCHERS
    if dispatching() or overriding() or transforming() is not None or tracing() is not None:
        return False
    graph = _is_grad_enabled()
    return all(tensor is None or _is_plain(tensor, graph) for tensor in tensors)


def _is_plain(tensor: Tensor, graph: bool) -> bool:
    return (
        type(tensor) in _PLAIN
        and (tensor.is_cpu or tensor.is_cuda)
        and not (graph and tensor.requires_grad)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )
