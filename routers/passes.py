"""Passes of labelled text through a model: checks of the input, and one forward at a time.

W windows, C context length, T tokens (W x C flattened), D model width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.routers.gates import Gate, find_gates
from moiety.routers.labelled import LabelledText
from moiety.routers.together import is_sharded
from moiety.scoring import token_losses
from moiety.text import Windows


def linear_gates(model: nn.Module) -> list[Gate]:
    """The gates of a model, all of them linear in their features and with nothing else to learn.

    A `selection_bias` is let be: it follows the load and is not learned. Raises InputError for
    a gate that has no weight, as there is nothing to fit, and for one with a bias or a score
    correction: a weight alone does not decide its routes, so it can be neither fitted in closed
    form nor trained as one matrix.
    """
    gates = find_gates(model)
    for gate in gates:
        if getattr(gate.module, "weight", None) is None:
            raise InputError(
                f"expected gates with a weight, but {gate.name} has none, so there is nothing to "
                "fit or train; choose a kind of router that learns"
            )
        tensors = [*gate.module.named_parameters(), *gate.module.named_buffers()]
        others = [name for name, _tensor in tensors if name not in ("weight", "selection_bias")]
        if others:
            raise InputError(
                f"expected {gate.name} to be a gate with a weight only, but it also has {others}; "
                "routers of this kind cannot be fitted or trained here"
            )
    return gates


def check_domains(
    data: Mapping[str, Windows], own_expert: Mapping[str, int], gates: Sequence[Gate]
) -> None:
    """Raise InputError unless every domain has windows and an own expert in every gate."""
    if not data:
        raise InputError("expected text of at least one domain, but there is none")
    for domain, windows in data.items():
        if domain not in own_expert:
            raise InputError(
                f"expected every domain to have an own expert, but {domain!r} has none; "
                f"own experts are given for {sorted(own_expert)}"
            )
        for gate in gates:
            if not 0 <= own_expert[domain] < gate.experts:
                raise InputError(
                    f"own expert of {domain!r} must be in 0..{gate.experts - 1} "
                    f"for {gate.name}, but it is {own_expert[domain]}"
                )
        if len(windows) == 0:
            raise InputError(f"expected windows of text for {domain!r}, but there are none")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gate noise off inside the block; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: the device of its input embeddings."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weights = [embeddings.weight] if embeddings is not None else list(model.parameters())
    return weights[0].device


@torch.no_grad()
def run_decoder(model: nn.Module, text: Windows | LabelledText) -> None:
    """Run the decoder for what its gates see: no cache, no gradient.

    Vocabulary logits are left out, unless the head has a gate of its own or the weights are
    sharded, which only a pass through the whole model gathers.
    """
    device = input_device(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    routed_head = isinstance(getattr(head, "router", None), nn.Module)
    everything = routed_head or is_sharded(model)
    decoder = model if everything else getattr(model, "base_model", model)
    decoder(
        input_ids=text.ids_WC.to(device),
        attention_mask=text.mask_WC.to(device),
        use_cache=False,
    )


def next_token_loss(model: nn.Module, ids_WC: Tensor, mask_WC: Tensor) -> Tensor:
    """Sum over the predicted tokens of -log p(token | those before), in nats, as fp32."""
    outputs = model(input_ids=ids_WC, attention_mask=mask_WC, use_cache=False)
    return token_losses(outputs.logits, ids_WC, mask_WC).sum()


def predicted_tokens(mask_WC: Tensor) -> Tensor:
    """How many tokens a model is asked to predict: all but the first of each window."""
    return mask_WC[:, 1:].sum()
