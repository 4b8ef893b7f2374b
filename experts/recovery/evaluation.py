"""Held-back loss of a network, spread over processes, with parameters as they will be stored."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moiety.scoring import token_losses
from moiety.text import Windows


@torch.no_grad()
def evaluate(
    network: nn.Module, windows: Windows, batch_size: int, accelerator: Accelerator
) -> float:
    """Nats a token on the windows; every process takes its share of them and knows the result."""
    device = accelerator.device
    own = windows.select(slice(accelerator.process_index, None, accelerator.num_processes))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for part in own.batches(batch_size):
        ids_WC, mask_WC = part.ids_WC.to(device), part.mask_WC.to(device)
        with accelerator.autocast():
            logits_WCV = network(input_ids=ids_WC, attention_mask=mask_WC, use_cache=False).logits
        nats += token_losses(logits_WCV, ids_WC, mask_WC).sum(dtype=torch.float64)
    total = cast(Tensor, accelerator.reduce(nats, "sum"))
    return float(total) / int(windows.mask_WC[:, 1:].sum())


@contextlib.contextmanager
def as_stored(
    parameters: Mapping[str, nn.Parameter], stored: Mapping[str, torch.dtype]
) -> Iterator[None]:
    """Inside the block the parameters named in `stored` are rounded to these dtypes."""
    before = {name: parameters[name].detach().clone() for name in stored}
    try:
        for name, dtype in stored.items():
            parameters[name].data.copy_(before[name].to(dtype))
        yield
    finally:
        for name, tensor in before.items():
            parameters[name].data.copy_(tensor)
