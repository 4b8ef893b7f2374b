"""How good the gates of a model are on held-out text: its loss, and where its tokens go.

W windows, C context length, T tokens (W x C flattened), E experts, A active experts, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moiety.routers.gates import Gate, Route, forced, per_token, watched
from moiety.routers.labelled import LabelledText
from moiety.routers.losses import expert_counts, load_shares
from moiety.routers.passes import evaluating, input_device, next_token_loss, predicted_tokens


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out text seen through the gates after `step` training steps.

    `loss`: nats per predicted token, the mean of `domain_losses`, so that domains (and text that
    switches between them, where there is any) count the same. `regret`: that loss above the
    oracle route's, every token at its own expert. `max_violation`: (largest load - mean load) /
    mean load of the worst layer, 0 when even (loss-free balancing, arXiv:2408.15664).
    `load_entropy`: entropy of the load over that of an even one, of the worst layer, 1 when even.
    `dead_experts`: experts, summed over layers, that no token chose. `own_share`: share of the
    routing weight that goes to the own expert. Loads and shares count the domains the same.
    """

    step: int
    loss: float
    domain_losses: dict[str, float]
    regret: float
    max_violation: float
    load_entropy: float
    dead_experts: int
    own_share: float

    def line(self) -> str:
        """One line to show."""
        return (
            f"step {self.step}: held-out loss {self.loss:.4f}, regret {self.regret:.4f}, "
            f"own-domain share {self.own_share:.3f}, MaxVio {self.max_violation:.2f}, "
            f"load entropy {self.load_entropy:.2f}, dead experts {self.dead_experts}"
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Evaluation":
        """From what `to_json` gave."""
        return cls(**{field.name: value[field.name] for field in fields(cls)})


def evaluate(
    model: nn.Module,
    gates: Sequence[Gate],
    heldout: Mapping[str, LabelledText],
    oracle: Mapping[str, float],
    accelerator: Accelerator,
    *,
    batch_size: int,
    step: int,
) -> Evaluation:
    """One pass over held-out text, its batches spread over the processes.

    `oracle` are the losses that `oracle_losses` gave for the same text.
    """
    with evaluating(model), torch.no_grad():
        sums = {
            name: _text_sums(model, gates, text, accelerator, batch_size)
            for name, text in heldout.items()
        }
    losses = {name: float(one.loss / one.predicted) for name, one in sums.items()}
    load_LE = torch.stack([one.load_LE for one in sums.values()]).mean(0)
    own_shares = [float((one.own_L / one.weight_L).mean()) for one in sums.values()]
    return Evaluation(
        step=step,
        loss=sum(losses.values()) / len(losses),
        domain_losses=losses,
        regret=sum(losses[name] - oracle[name] for name in losses) / len(losses),
        max_violation=float((load_LE.max(-1).values / load_LE.mean(-1)).max() - 1),
        load_entropy=_load_entropy(load_LE),
        dead_experts=int((load_LE == 0).sum()),
        own_share=sum(own_shares) / len(own_shares),
    )


def oracle_losses(
    model: nn.Module,
    gates: Sequence[Gate],
    heldout: Mapping[str, LabelledText],
    accelerator: Accelerator,
    *,
    batch_size: int,
) -> dict[str, float]:
    """Nats per predicted token of each text when every token goes to its own expert."""
    losses: dict[str, float] = {}
    with evaluating(model), torch.no_grad():
        for name, text in heldout.items():
            sums = _text_sums(model, gates, text, accelerator, batch_size, oracle=True)
            losses[name] = float(sums.loss / sums.predicted)
    return losses


def _load_entropy(load_LE: Tensor) -> float:
    experts = load_LE.shape[1]
    if experts == 1:
        return 1.0
    return float(torch.special.entr(load_LE).sum(-1).min()) / math.log(experts)


@dataclass
class _Sums:
    loss: Tensor
    predicted: Tensor
    count_LE: Tensor
    own_L: Tensor
    weight_L: Tensor

    @classmethod
    def empty(cls, gates: Sequence[Gate], device: torch.device) -> "_Sums":
        layers, experts = len(gates), max(gate.experts for gate in gates)
        shapes = [(), (), (layers, experts), (layers,), (layers,)]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @property
    def load_LE(self) -> Tensor:
        return torch.stack([load_shares(count_E) for count_E in self.count_LE])

    def add_loss(self, loss: Tensor, mask_WC: Tensor) -> None:
        self.loss += loss.to(self.loss.device)
        self.predicted += predicted_tokens(mask_WC).to(self.loss.device)

    def add_route(self, route: Route, mask_T: Tensor, own_T: Tensor) -> None:
        device = route.experts_TA.device
        mask_T, own_T = mask_T.to(device), own_T.to(device)
        counts_E = expert_counts(route.experts_TA, mask_T, self.count_LE.shape[1], route.weights_TA)
        weights_TA = route.weights_TA[mask_T].double()
        own_TA = route.experts_TA[mask_T] == own_T[mask_T, None]
        self.count_LE[route.layer] += counts_E.to(self.count_LE.device)
        self.own_L[route.layer] += (weights_TA * own_TA).sum().to(self.own_L.device)
        self.weight_L[route.layer] += weights_TA.sum().to(self.weight_L.device)


def _text_sums(
    model: nn.Module,
    gates: Sequence[Gate],
    text: LabelledText,
    accelerator: Accelerator,
    batch_size: int,
    oracle: bool = False,
) -> _Sums:
    """Sums over all processes' batches.

    Every process runs as many passes, the last one possibly uncounted: where the weights are
    sharded, a pass needs all of them.
    """
    device, processes = input_device(model), accelerator.num_processes
    sums, uncounted = _Sums.empty(gates, device), _Sums.empty(gates, device)
    batches = list(text.batches(batch_size))
    for first in range(0, len(batches), processes):
        index = first + accelerator.process_index
        counted = index < len(batches)
        batch = batches[index if counted else -1]
        _add_batch(sums if counted else uncounted, model, gates, batch, device, oracle)
    for field in fields(sums):
        setattr(sums, field.name, accelerator.reduce(getattr(sums, field.name), "sum"))
    return sums


def _add_batch(
    sums: _Sums,
    model: nn.Module,
    gates: Sequence[Gate],
    batch: LabelledText,
    device: torch.device,
    oracle: bool,
) -> None:
    mask_T, own_T = batch.mask_WC.flatten().bool(), batch.own_WC.flatten()

    def listen(route: Route) -> None:
        sums.add_route(route, mask_T, own_T)

    forcing = forced(gates if oracle else (), per_token(batch.own_WC))
    with forcing, watched(gates, listen):
        loss = next_token_loss(model, batch.ids_WC.to(device), batch.mask_WC.to(device))
    sums.add_loss(loss, batch.mask_WC)
