"""Open whatever a folder or hub id holds: a composite, a packed or dense model, a task vector."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moiety.compose.routed
import moiety.experts.quantizer  # noqa: F401
from moiety.compose.composite import Composite
from moiety.compose.ensemble import EnsembleForCausalLM
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint, local_folder
from moiety.experts.delta import base_of, open_delta
from moiety.experts.preflight import load_tokenizer
from moiety.routers import find_gates


def open_any(model: str | Path, dtype: str | torch.dtype = "auto") -> Composite:
    """Open any language model with its tokenizer; `experts` is empty where nothing is routed.

    A task vector is opened with its base, in the base's dtypes. Raises InputError when there is
    no such model or its files are damaged.
    """
    folder = local_folder(model)
    if base_of(Checkpoint(folder).config) is not None:
        network = open_delta(folder)
    else:
        network = _open(folder, dtype)
    return Composite(folder, network, load_tokenizer(folder), _experts(network))


def _open(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"expected a language model in {folder}, but: {error}") from error


def _experts(network: PreTrainedModel) -> tuple[str, ...]:
    if isinstance(network, EnsembleForCausalLM):
        return network.config.experts
    try:
        gates = find_gates(network)
    except InputError:
        return ()
    named = getattr(network.config, "moiety", None) or {}
    return tuple(named.get("experts") or (f"expert {index}" for index in range(gates[0].experts)))
