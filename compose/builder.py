"""The stages of one recipe: prune each finetune, choose the shared part, learn the gates.

Each stage is a folder named by the digest of its inputs, made when first asked for.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from moiety.compose import mixture, shared
from moiety.compose.composite import Composite, gate_tensors, open_composite
from moiety.compose.recipe import Expert, Recipe
from moiety.compose.route import route_model
from moiety.compose.stages import Stages
from moiety.experts.checkpoint import Checkpoint, local_folder
from moiety.experts.preflight import load_tokenizer
from moiety.experts.prune import prune
from moiety.experts.quantizer import PackedConfig
from moiety.files import digest, digest_of_folder, write_json
from moiety.progress import SILENT, Progress
from moiety.text import Windows, digest_documents, read_documents, token_windows
from moiety.version import __version__


class Builder:
    """The stages of one recipe, each made when first asked for."""

    def __init__(self, recipe: Recipe, stages: Stages, progress: Progress = SILENT) -> None:
        self.recipe = recipe
        self.stages = stages
        self.progress = progress
        self.base = Checkpoint(recipe.base)
        self.finetunes = {expert.name: Checkpoint(expert.model) for expert in recipe.experts}
        self.tokenizer = load_tokenizer(self.base.folder)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Digests of every model and calibration text, and the version: what results hang on."""
        texts = {
            expert.name: digest_documents(read_documents(expert.domain.calibration))
            for expert in self.recipe.experts
        }
        models = {name: digest_of_folder(c.folder) for name, c in self.finetunes.items()}
        base = digest_of_folder(self.base.folder)
        return {"version": __version__, "base": base, "models": models, "texts": texts}

    @cached_property
    def key(self) -> str:
        """Digest of everything the composite hangs on."""
        settings = self.recipe.model_dump(exclude={"base", "experts", "evaluate"})
        return digest({"inputs": self.inputs, "names": self.recipe.names, "settings": settings})

    @cached_property
    def calibration(self) -> dict[str, Windows]:
        """Calibration windows of every domain, in the experts' order."""
        return {
            expert.name: token_windows(
                self.tokenizer,
                read_documents(expert.domain.calibration),
                self.recipe.context_length,
                self.recipe.calibration_windows,
            )
            for expert in self.recipe.experts
        }

    @cached_property
    def experts(self) -> dict[str, Path]:
        """Folder of every pruned, packed finetune."""
        return {expert.name: self._expert(expert) for expert in self.recipe.experts}

    def _expert(self, expert: Expert) -> Path:
        settings = self.recipe.prune_settings()
        inputs = {
            "version": __version__,
            "model": self.inputs["models"][expert.name],
            "text": self.inputs["texts"][expert.name],
            "settings": vars(settings),
        }

        def make(scratch: Path) -> None:
            model, text = local_folder(expert.model), expert.domain.calibration
            work = self.stages.folder / "pruning"
            prune(model, scratch / "model", text, settings, self.progress, work=work)

        return self.stages.run(f"expert-{expert.name}", inputs, make) / "model"

    @cached_property
    def chosen(self) -> Path:
        """Folder of the shared part: `shared.safetensors` and `choice.json`."""
        settings = self.recipe.compose.model_dump(exclude={"top_k"})
        return self.stages.run("shared", self._stage_inputs(settings), self._choose)

    def _stage_inputs(self, settings: Any) -> dict[str, Any]:
        return {
            **self.inputs,
            "experts": [path.parent.name for path in self.experts.values()],
            "batch_size": self.recipe.batch_size,
            "settings": settings,
        }

    def _choose(self, scratch: Path) -> None:
        tried = shared.candidates(self.recipe.compose)
        losses = {tried[0]: float("nan")}
        if len(tried) > 1:
            start = tried[0].tensors(self.base, self.finetunes)
            model = self._unrouted(scratch / "unrouted", start).model
            losses = shared.choose(
                model,
                self.base,
                self.finetunes,
                self.calibration,
                tried,
                self.recipe.batch_size,
                self.progress,
            )
        best = min(losses, key=lambda candidate: losses[candidate])
        tensors = best.tensors(self.base, self.finetunes)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            scratch / "shared.safetensors",
        )
        write_json(
            scratch / "choice.json",
            {
                "chosen": str(best),
                "calibration_loss_oracle_route": {str(c): loss for c, loss in losses.items()},
            },
        )

    def _unrouted(self, folder: Path, shared_part: Mapping[str, Tensor]) -> Composite:
        """The packed mixture with gates that prefer no expert, in memory; `folder` is scratch."""
        folder.mkdir()
        self._write(folder, self.packed, shared_part, None)
        composite = open_composite(folder)
        shutil.rmtree(folder)
        return composite

    @property
    def packed(self) -> list[Mapping[str, Tensor]]:
        """The packed experts' tensors, in order."""
        return [Checkpoint(folder) for folder in self.experts.values()]

    @property
    def packing(self) -> PackedConfig | None:
        """How the mixture's experts are packed."""
        each = {n: PackedConfig.of(Checkpoint(f).config) for n, f in self.experts.items()}
        return mixture.packed_mixture(self.base.config.num_hidden_layers, each)

    @property
    def shared_tensors(self) -> dict[str, Tensor]:
        """The chosen shared part."""
        return load_file(self.chosen / "shared.safetensors")

    @cached_property
    def routed(self) -> Path:
        """Folder of the learned gates: `gates.safetensors` and `route.json`."""
        settings = {
            "route": self.recipe.route.model_dump(),
            "top_k": self.recipe.compose.top_k,
            "seed": self.recipe.seed,
            "shared": self.chosen.name,
        }
        return self.stages.run("route", self._stage_inputs(settings), self._route)

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
        save_file(gate_tensors(composite.model), scratch / "gates.safetensors")
        write_json(scratch / "route.json", report.to_dict())

    @property
    def gates(self) -> list[Tensor]:
        """The learned gates, one (E, D) a layer."""
        tensors = load_file(self.routed / "gates.safetensors")
        layers = range(self.base.config.num_hidden_layers)
        return [tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in layers]

    def write(self, folder: Path, *, dense: bool = False) -> None:
        """Write the composite into an empty folder, packed or with the unpruned finetunes."""
        experts = list(self.finetunes.values()) if dense else self.packed
        self._write(folder, experts, self.shared_tensors, self.gates, dense=dense)

    def _write(
        self,
        folder: Path,
        experts: Sequence[Mapping[str, Tensor]],
        shared_part: Mapping[str, Tensor],
        gates: Sequence[Tensor] | None,
        *,
        dense: bool = False,
    ) -> None:
        packed = None if dense else self.packing
        config = mixture.mixture_config(
            self.base.config, self.recipe.names, self.recipe.compose.top_k, packed
        )
        dtype = next(iter(shared_part.values())).dtype
        gates = gates or mixture.zero_gates(config, dtype)
        tensors = mixture.mixture_tensors(shared_part, experts, gates)
        mixture.write_mixture(folder, config, tensors, self.tokenizer, _generation(self.base))


def _generation(base: Checkpoint) -> GenerationConfig | None:
    if not (base.folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(base.folder)
