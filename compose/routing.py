"""The stages of composites that route: choose the shared part, learn the gates."""

import shutil
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moiety.compose import shared
from moiety.compose.account import Use
from moiety.compose.builder import Builder
from moiety.compose.composite import Composite, gate_weights, open_composite
from moiety.compose.learning import route_model
from moiety.compose.recipe import Mixture, Routed
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.shards import write_weights
from moiety.files import read_json, write_json


class RoutingBuilder(Builder):
    """A composite with gates: mixtures and routed models."""

    @property
    def settings(self) -> Mixture | Routed:
        """The recipe's section `compose`."""
        assert isinstance(self.recipe.compose, Mixture | Routed)
        return self.recipe.compose

    @abstractmethod
    def is_shared(self, name: str) -> bool:
        """Whether a tensor of the base's architecture belongs to the shared part."""

    @abstractmethod
    def assemble(
        self,
        folder: Path,
        shared_part: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None,
        *,
        dense: bool = False,
    ) -> None:
        """Write the composite with these shared tensors and gates (None: they prefer no expert)."""

    @abstractmethod
    def twin(self, name: str | None) -> dict[str, Tensor]:
        """The dense tensors, in the base's architecture, that a one-hot route stands for.

        With `name` None, those of no expert: the shared part, and the base where it is dense.
        """

    def write(self, folder: Path, *, dense: bool = False) -> None:
        """Run what is not done yet and write the composite into an empty folder."""
        self.assemble(folder, self.shared_tensors, self.gates, dense=dense)

    @property
    def source(self) -> str:
        """Where the shared part comes from."""
        return read_json(self.chosen / "choice.json")["chosen"]

    def use_of_shared(self, owner: str | None) -> Use:
        """What became of the shared tensors of one expert, or of the base (None)."""
        return shared.use_of(self.source, owner, self.recipe.names)

    def facts(self) -> dict[str, Any]:
        """Where the shared part comes from and how many parameters were trained."""
        return {
            "shared": self.source,
            "gate_parameters": read_json(self.routed / "route.json")["parameters"],
        }

    @cached_property
    def chosen(self) -> Path:
        """Folder of the shared part: `shared` with its tensors, and `choice.json`."""
        settings = {
            **self.settings.model_dump(exclude={"top_k", "router"}),
            "seed": self.recipe.seed,
        }
        return self.stages.run("shared", self.stage_inputs(settings), self._choose)

    def _choose(self, scratch: Path) -> None:
        tried = shared.candidates(self.settings, self.recipe.seed)
        losses = {tried[0]: float("nan")}
        if len(tried) > 1:
            start = self._tensors(tried[0])
            model = self._unrouted(scratch / "unrouted", start).model
            losses = shared.choose(
                model,
                tried,
                self._tensors,
                self.calibration,
                self.recipe.batch_size,
                self.progress,
            )
        best = min(losses, key=lambda candidate: losses[candidate])
        (scratch / "shared").mkdir()
        write_weights(scratch / "shared", self._tensors(best).items())
        write_json(
            scratch / "choice.json",
            {
                "chosen": str(best),
                "calibration_loss_oracle_route": {str(c): loss for c, loss in losses.items()},
            },
        )

    def _tensors(self, candidate: shared.Candidate) -> Mapping[str, Tensor]:
        return candidate.tensors(self.base, self.finetunes, self.is_shared)

    def _unrouted(self, folder: Path, shared_part: Mapping[str, Tensor]) -> Composite:
        """The composite with gates that prefer no expert, in memory; `folder` is scratch."""
        folder.mkdir()
        self.assemble(folder, shared_part, None)
        composite = open_composite(folder)
        shutil.rmtree(folder)
        return composite

    @cached_property
    def shared_tensors(self) -> Mapping[str, Tensor]:
        """The chosen shared part, each tensor read when it is asked for."""
        return Checkpoint(self.chosen / "shared")

    @cached_property
    def routed(self) -> Path:
        """Folder of the learned gates: `gates.safetensors` and `route.json`."""
        settings = {
            "route": self.recipe.route.model_dump(),
            "top_k": self.settings.top_k,
            "router": self.settings.router.model_dump()
            if isinstance(self.settings, Routed)
            else {},
            "seed": self.recipe.seed,
            "shared": self.chosen.name,
        }
        return self.stages.run("route", self.stage_inputs(settings), self._route)

    def _route(self, scratch: Path) -> None:
        composite = self._unrouted(scratch / "unrouted", self.shared_tensors)
        report = route_model(
            composite,
            self.calibration,
            self.recipe.route,
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            progress=self.progress,
        )
        save_file(gate_weights(composite.model), scratch / "gates.safetensors")
        write_json(scratch / "route.json", report.to_dict())

    @property
    def gates(self) -> dict[str, Tensor]:
        """The learned gates by the names of their tensors."""
        return load_file(self.routed / "gates.safetensors")
