"""Which parameters train, and the fp32 masters that the optimizer moves in their place.

E experts, W features of a gate (the model's width, or more for one with contexts).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moiety.routers.gates import Gate
from moiety.routers.together import put, whole


def gate_weights(gates: Sequence[Gate]) -> dict[str, nn.Parameter]:
    """The weights (E, W) of gates by their names in the model."""
    return {f"{gate.name}.weight": cast(nn.Parameter, gate.module.weight) for gate in gates}


def gate_biases(gates: Sequence[Gate]) -> dict[str, Tensor]:
    """The selection biases (E,) of the gates that have one, by their names in the model."""
    return {
        f"{gate.name}.selection_bias": gate.module.get_buffer("selection_bias")
        for gate in gates
        if hasattr(gate.module, "selection_bias")
    }


@contextlib.contextmanager
def only_gates_train(model: nn.Module, gates: Sequence[Gate]) -> Iterator[None]:
    """Freeze everything but the gate weights inside the block; all flags come back after."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights = gate_weights(gates)
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for weight_EW in weights.values():
            weight_EW.requires_grad_(True)
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        assert trained == set(weights)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
        for weight_EW in weights.values():
            weight_EW.grad = None


class Masters:
    """fp32 copies of gate weights: small steps are not lost when a gate is stored in bf16.

    Mixed precision training (Micikevicius et al. 2018, arXiv:1710.03740, §3.1). The gates hold
    the masters rounded to their own dtype, so what is evaluated is what will be saved. Selection
    biases, which no optimizer moves, are kept the same way in `biases`.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self.weights = gate_weights(gates)
        self._biases = gate_biases(gates)
        self.masters = {
            name: nn.Parameter(whole(weight_EW.detach()).float().clone())
            for name, weight_EW in self.weights.items()
        }
        self.biases = {name: bias_E.float().clone() for name, bias_E in self._biases.items()}

    @property
    def names(self) -> list[str]:
        """The tensors' names in the model, biases included."""
        return list(self._held())

    def take_gradients(self, accelerator: Accelerator) -> None:
        """Move the gates' gradients to the masters, summed over the processes.

        A gate that is spread over them has the mean of their gradients already.
        """
        for name, master_EW in self.masters.items():
            gradient_EW = self.weights[name].grad
            if isinstance(gradient_EW, DTensor):
                master_EW.grad = gradient_EW.full_tensor().float() * accelerator.num_processes
            else:
                if gradient_EW is None:
                    gradient_EW = torch.zeros_like(master_EW)
                master_EW.grad = cast(Tensor, accelerator.reduce(gradient_EW.float(), "sum"))
            self.weights[name].grad = None

    def balance(self, counts: Sequence[Tensor], step: float) -> None:
        """Raise the bias of experts with less than the mean load by `step`, lower the others'.

        Loss-free balancing (arXiv:2408.15664, algorithm 1); `counts` are the tokens of each
        expert in the layer of each bias, (E,), over all processes.
        """
        for bias_E, count_E in zip(self.biases.values(), counts, strict=True):
            bias_E += step * (count_E.mean() - count_E).sign().to(bias_E.device)

    def write(self) -> None:
        """Round the masters and the biases into the gates."""
        self.write_gates({**self.masters, **self.biases})

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the gates as they are, their biases included."""
        return {name: whole(tensor.detach()).clone() for name, tensor in self._held().items()}

    def write_gates(self, values: Mapping[str, Tensor]) -> None:
        """Set the gates, leaving the masters."""
        held = self._held()
        for name, value in values.items():
            put(held[name], value.detach())

    def _held(self) -> dict[str, Tensor]:
        return {**self.weights, **self._biases}
