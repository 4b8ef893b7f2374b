"""How good the gates of a model are on held-out text: its loss, and where its tokens go.

W windows, C context length, T tokens (W x C flattened), E experts, A active experts, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moiety.routers.gates import Gate, Route, watched
from moiety.routers.losses import expert_counts, load_shares
from moiety.routers.passes import evaluating, input_device, next_token_loss, predicted_tokens
from moiety.text import Windows


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out text seen through the gates after `step` training steps.

    `loss`: nats per predicted token, the mean of `domain_losses`, so that domains count the
    same. `max_violation`: (largest load - mean load) / mean load of the worst layer, 0 when even
    (loss-free balancing, arXiv:2408.15664). `dead_experts`: experts, summed over layers, that no
    token chose. `own_share`: share of the routing weight that goes to the own expert. Loads
    and shares count the domains the same.
    """

    step: int
    loss: float
    domain_losses: dict[str, float]
    max_violation: float
    dead_experts: int
    own_share: float

    def line(self) -> str:
        """One line to show."""
        return (
            f"step {self.step}: held-out loss {self.loss:.4f}, own-domain share "
            f"{self.own_share:.3f}, MaxVio {self.max_violation:.2f}, "
            f"dead experts {self.dead_experts}"
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
    heldout: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    accelerator: Accelerator,
    *,
    batch_size: int,
    step: int,
) -> Evaluation:
    """One pass over held-out text, its batches spread over the processes."""
    with evaluating(model), torch.no_grad():
        sums = {
            domain: _domain_sums(model, gates, windows, own_expert[domain], accelerator, batch_size)
            for domain, windows in heldout.items()
        }
    losses = {domain: float(one.loss / one.predicted) for domain, one in sums.items()}
    load_LE = torch.stack([one.load_LE for one in sums.values()]).mean(0)
    own_shares = [float((one.own_L / one.weight_L).mean()) for one in sums.values()]
    return Evaluation(
        step=step,
        loss=sum(losses.values()) / len(losses),
        domain_losses=losses,
        max_violation=float((load_LE.max(-1).values / load_LE.mean(-1)).max() - 1),
        dead_experts=int((load_LE == 0).sum()),
        own_share=sum(own_shares) / len(own_shares),
    )


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

    def add_route(self, route: Route, mask_T: Tensor, own: int) -> None:
        mask_T = mask_T.to(route.experts_TA.device)
        counts_E = expert_counts(route.experts_TA, mask_T, self.count_LE.shape[1])
        weights_TA = route.weights_TA[mask_T].double()
        own_TA = route.experts_TA[mask_T] == own
        self.count_LE[route.layer] += counts_E.to(self.count_LE.device)
        self.own_L[route.layer] += (weights_TA * own_TA).sum().to(self.own_L.device)
        self.weight_L[route.layer] += weights_TA.sum().to(self.weight_L.device)


def _domain_sums(
    model: nn.Module,
    gates: Sequence[Gate],
    windows: Windows,
    own: int,
    accelerator: Accelerator,
    batch_size: int,
) -> _Sums:
    device = input_device(model)
    sums = _Sums.empty(gates, device)
    for index, batch in enumerate(windows.batches(batch_size)):
        if index % accelerator.num_processes != accelerator.process_index:
            continue
        mask_T = batch.mask_WC.flatten().bool()

        def listen(route: Route, mask_T: Tensor = mask_T) -> None:
            sums.add_route(route, mask_T, own)

        with watched(gates, listen):
            loss = next_token_loss(model, batch.ids_WC.to(device), batch.mask_WC.to(device))
        sums.loss += loss.to(device)
        sums.predicted += predicted_tokens(batch.mask_WC).to(device)
    for field in fields(sums):
        setattr(sums, field.name, accelerator.reduce(getattr(sums, field.name), "sum"))
    return sums
