"""Which parameters train, and the fp32 masters that the optimizer moves in their place.

D model width, E experts.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moiety.routers.gates import Gate


def gate_weights(gates: Sequence[Gate]) -> dict[str, nn.Parameter]:
    """The weights (E, D) of gates by their names in the model."""
    return {f"{gate.name}.weight": cast(nn.Parameter, gate.module.weight) for gate in gates}


@contextlib.contextmanager
def only_gates_train(model: nn.Module, gates: Sequence[Gate]) -> Iterator[None]:
    """Freeze everything but the gate weights inside the block; all flags come back after."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights = gate_weights(gates)
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for weight_ED in weights.values():
            weight_ED.requires_grad_(True)
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        assert trained == set(weights)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
        for weight_ED in weights.values():
            weight_ED.grad = None


class Masters:
    """fp32 copies of gate weights: small steps are not lost when a gate is stored in bf16.

    Mixed precision training (Micikevicius et al. 2018, arXiv:1710.03740, §3.1). The gates hold
    the masters rounded to their own dtype, so what is evaluated is what will be saved.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self.weights = gate_weights(gates)
        self.masters = {
            name: nn.Parameter(weight_ED.detach().float().clone())
            for name, weight_ED in self.weights.items()
        }

    def take_gradients(self, accelerator: Accelerator) -> None:
        """Move the gates' gradients to the masters, summed over the processes."""
        for name, master_ED in self.masters.items():
            gradient_ED = self.weights[name].grad
            if gradient_ED is None:
                gradient_ED = torch.zeros_like(self.weights[name])
            master_ED.grad = cast(Tensor, accelerator.reduce(gradient_ED.float(), "sum"))
            self.weights[name].grad = None

    def write(self) -> None:
        """Round the masters into the gates."""
        self.write_weights(self.masters)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the gates as they are."""
        return {name: weight_ED.detach().clone() for name, weight_ED in self.weights.items()}

    @torch.no_grad()
    def write_weights(self, values: dict[str, Tensor] | dict[str, nn.Parameter]) -> None:
        """Set the gates, leaving the masters."""
        for name, value_ED in values.items():
            self.weights[name].copy_(value_ED)
