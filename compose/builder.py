"""What building any kind of composite has in common: its inputs and its pruned experts.

Each stage is a folder named by the digest of its inputs, made when first asked for.
"""

import re
from abc import ABC, abstractmethod
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import moiety.experts.quantizer  # noqa: F401
from moiety.compose.recipe import Expert, Recipe
from moiety.compose.stages import Stages
from moiety.compose.union import unite
from moiety.errors import InputError
from moiety.experts.architecture import Architecture
from moiety.experts.checkpoint import Checkpoint, digest_of_model
from moiety.experts.preflight import load_tokenizer
from moiety.experts.prune import prune
from moiety.experts.source import resolve
from moiety.files import digest, digest_of_folder
from moiety.progress import SILENT, Progress
from moiety.text import Windows, digest_documents, token_windows
from moiety.version import __version__


class Builder(ABC):
    """The stages of one recipe; a subclass for each kind of composite says what they are.

    An adapter given as a finetune is merged into the base first, in the folder of the stages.
    """

    def __init__(self, recipe: Recipe, stages: Stages, progress: Progress = SILENT) -> None:
        self.recipe = recipe
        self.stages = stages
        self.progress = progress
        given = Checkpoint(recipe.base)
        each = [
            Checkpoint(resolve(expert.model, stages.folder / "merged", recipe.base, progress))
            for expert in recipe.experts
        ]
        self.base, *found = (
            self._united([given, *each]) if recipe.tokenizer == "union" else [given, *each]
        )
        self.finetunes = dict(zip(recipe.names, found, strict=True))
        self.tokenizer = load_tokenizer(self.base.folder)

    def _united(self, models: list[Checkpoint]) -> list[Checkpoint]:
        """The models with one tokenizer; InputError if they are only looked for and not there."""
        folders = [model.folder for model in models]
        inputs = {"version": __version__, "models": list(map(digest_of_model, folders))}
        made = self.stages.run("union", inputs, partial(unite, folders, progress=self.progress))
        if not made.is_dir():
            raise InputError(f"expected the models with one tokenizer in {made}, but it is absent")
        return [Checkpoint(made / str(number)) for number in range(len(models))]

    @abstractmethod
    def write(self, folder: Path, *, dense: bool = False) -> None:
        """Run what is not done yet and write the composite into an empty folder.

        `dense`: with the unpruned finetunes in the place of the sparse experts (a control).
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What was chosen and learned on the way, JSON-like; after `write`."""

    @abstractmethod
    def tensors(self) -> dict[str, Any]:
        """Where every tensor of `base` and of all `experts` went (moiety.compose.account)."""

    def is_known(self, name: str) -> bool:
        """Whether the base's architecture has a tensor, be it part of a packed one.

        Others, which a checkpoint may hold all the same, are in no composite.
        """
        return re.sub(r"(?<=weight)(_mask|_scale)$", "", name) in self._known

    @cached_property
    def _known(self) -> set[str]:
        architecture = Architecture(self.base.config)
        return {*architecture.shapes, *architecture.tied}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Digests of every model and calibration text, and the version: what results hang on."""
        texts = {
            expert.name: digest_documents(expert.domain.documents())
            for expert in self.recipe.experts
            if expert.domain.has_text
        }
        models = {name: digest_of_folder(c.folder) for name, c in self.finetunes.items()}
        base = digest_of_folder(self.base.folder)
        return {"version": __version__, "base": base, "models": models, "texts": texts}

    @cached_property
    def key(self) -> str:
        """Digest of everything the composite hangs on."""
        settings = self.recipe.model_dump(exclude={"base", "experts", "evaluate"})
        own = {e.name: e.prune.model_dump() for e in self.recipe.experts if e.prune is not None}
        names = self.recipe.names
        return digest({"inputs": self.inputs, "names": names, "settings": settings, "own": own})

    @cached_property
    def calibration(self) -> dict[str, Windows]:
        """Calibration windows of every domain, in the experts' order."""
        return {
            expert.name: token_windows(
                self.tokenizer,
                expert.domain.documents(),
                self.recipe.context_length,
                self.recipe.calibration_windows,
            )
            for expert in self.recipe.experts
        }

    @cached_property
    def experts(self) -> dict[str, Path]:
        """Folder of every pruned, packed finetune."""
        return {expert.name: self._expert(expert) for expert in self.recipe.experts}

    @property
    def pruned_from(self) -> Path | None:
        """The base whose differences are pruned; None: whole weights are."""
        return None

    def _expert(self, expert: Expert) -> Path:
        settings, base = self.recipe.prune_settings(expert), self.pruned_from
        inputs = {
            "version": __version__,
            "model": self.inputs["models"][expert.name],
            "text": self._text_of(expert),
            "settings": vars(settings),
            **({} if base is None else {"base": self.inputs["base"]}),
        }

        def make(scratch: Path) -> None:
            model, text = self.finetunes[expert.name].folder, list(expert.domain.documents())
            work = self.stages.folder / "pruning"
            prune(model, scratch / "model", text, settings, self.progress, base=base, work=work)

        return self.stages.run(f"expert-{expert.name}", inputs, make) / "model"

    def _text_of(self, expert: Expert) -> str:
        """Digest of an expert's calibration text; InputError that says so when there is none."""
        known = self.inputs["texts"].get(expert.name)
        return known or digest_documents(expert.domain.documents())

    def open_expert(self, name: str) -> PreTrainedModel:
        """One sparse expert as a model of its own."""
        model = AutoModelForCausalLM.from_pretrained(self.experts[name], dtype="auto")
        return model.eval()

    def stage_inputs(self, settings: Any) -> dict[str, Any]:
        """What a stage after pruning hangs on, beside its own settings."""
        return {
            **self.inputs,
            "experts": [path.parent.name for path in self.experts.values()],
            "batch_size": self.recipe.batch_size,
            "settings": settings,
        }

    @property
    def generation(self) -> GenerationConfig | None:
        """The base's generation settings, if it has any."""
        if not (self.base.folder / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(self.base.folder)
