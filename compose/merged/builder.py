"""Build a static merge: dense, or sparse in one of three ways.

O out features, I in features.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moiety.compose.account import Use, account
from moiety.compose.merge import BASE, streamed
from moiety.compose.merge.properties import coefficients
from moiety.compose.merge.roles import roles
from moiety.compose.merged.checks import check_merge
from moiety.compose.merged.conflict import Contested, contest
from moiety.compose.merged.inputs import MergeInputs
from moiety.compose.merged.packed import Masked, verified, write_dense, write_packed
from moiety.compose.recipe import Merging
from moiety.compose.shared import CHOICE_WINDOWS, WEIGHTS
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.kernels.reference import unpack_bits
from moiety.experts.pattern import Pattern
from moiety.experts.prune import prune
from moiety.experts.write import stored_bytes
from moiety.files import new_folder, read_json, write_json
from moiety.scoring import score


class MergeBuilder(MergeInputs):
    """The stages of a merge: choose a weight if need be, merge, prune, verify."""

    def write(self, folder: Path, *, dense: bool = False) -> None:
        """Run what is not done yet and write the merge into an empty folder.

        A conflict-aware one is a task vector, which `moiety.experts.open_delta` opens; all others
        are stock architectures. `dense`: the finetunes' merge by the same method, unpruned. Raises
        InputError when the finetunes cannot be merged in this way.
        """
        check_merge(self.settings, self.recipe.prune, self.recipe.names)
        if not dense:
            shutil.copytree(self.made / "model", folder, dirs_exist_ok=True)
            return
        names, seed = list(filter(self.is_known, self.base)), self.recipe.seed
        write_dense(
            folder, self.base, streamed(self.base, self.finetunes, self.merging, names, seed)
        )

    def facts(self) -> dict[str, Any]:
        """Method, parameters, how it is sparse, what was verified and the bytes."""
        chosen = read_json(self.weighed / "weight.json") if self.settings.chooses_weight else {}
        return {
            "method": self.settings.method,
            "parameters": self.merging.parameters,
            "sparse": self.settings.sparse,
            **chosen,
            **read_json(self.made / "facts.json"),
        }

    def tensors(self) -> dict[str, Any]:
        """Where every tensor of every input went: into the merge, if its method takes a base."""
        names, sparse = self.recipe.names, self.settings.sparse
        has_base = sparse == "conflict_aware" or roles(self.settings.method, names)[0] == BASE

        def use(own: Use, name: str) -> Use:
            return own if self.is_known(name) else "unknown"

        of_base = partial(use, "merged" if has_base else "superseded")
        each = {n: account(ft, partial(use, "merged")) for n, ft in self.finetunes.items()}
        return {"base": account(self.base, of_base), "experts": each}

    @cached_property
    def merging(self) -> Merging:
        """The method with all its parameters, the weight chosen if the recipe leaves it."""
        if not self.settings.chooses_weight:
            return self.settings.merging()
        return self.settings.merging(read_json(self.weighed / "weight.json")["weight"])

    @property
    def _tried(self) -> tuple[float, ...]:
        """Differences that do not add up can be taken whole."""
        return (*WEIGHTS, 1.0) if self.settings.sparse == "conflict_aware" else WEIGHTS

    @cached_property
    def weighed(self) -> Path:
        """Folder of `weight.json`: mean calibration loss for every weight tried, and the best."""
        return self.stages.run("weight", self._inputs(tried=self._tried), self._weigh)

    @torch.no_grad()
    def _weigh(self, scratch: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.base.folder, dtype="auto").eval()
        state = model.state_dict()
        windows = {n: w.select(slice(CHOICE_WINDOWS)) for n, w in self.calibration.items()}
        losses: dict[float, float] = {}
        for weight in self.progress.track(self._tried, "try weights", len(self._tried)):
            for name, tensor in self._whole(self.settings.merging(weight)):
                state[name].copy_(tensor)
            each = [score(model, text, self.recipe.batch_size).loss for text in windows.values()]
            losses[weight] = sum(each) / len(each)
            self.progress.note(f"weight {weight:g}: {losses[weight]:.4f}")
        best = min(losses, key=lambda weight: losses[weight])
        listed = {f"{weight:g}": loss for weight, loss in losses.items()}
        write_json(scratch / "weight.json", {"weight": best, "calibration_loss": listed})

    def _merged(
        self, merging: Merging, places: Counter[str] | None = None
    ) -> Iterator[tuple[str, Masked]]:
        """The merge by the stock names: matrices that are to be sparse in fp32 with their masks.

        Under `conflict_aware` those are differences to the base; `places` then counts what each
        finetune got.
        """
        base, finetunes = self.sources
        mode, seed = self.settings.sparse, self.recipe.seed
        contested = self.modules if mode == "conflict_aware" else []
        masked = {f"{m}.weight" for m in self.modules} if mode == "shared_mask" else set()
        left = {f"{module}.weight" for module in contested}
        whole = [name for name in self.base if name not in left and self.is_known(name)]
        for name, tensor in streamed(base, finetunes, merging, whole, seed, exact=masked):
            yield name, (tensor, self._mask_of(name) if name in masked else None)
        factors = coefficients(merging, list(finetunes)) if contested else {}
        for module in contested:
            result = self._contested(module, factors)
            if places is not None:
                places.update(result.places)
            yield f"{module}.weight", (result.delta_OI, result.mask_OI)

    def _mask_of(self, name: str) -> Tensor:
        mask, columns = Checkpoint(self.mask), self.base.shapes()[name][0][1]
        return unpack_bits(mask[f"{name}_mask"], columns)

    def _contested(self, module: str, factors: Mapping[str, float]) -> Contested:
        name, pattern = f"{module}.weight", Pattern.parse(self.pruning.pattern)
        base_OI = self.base[name].float()
        deltas = ((own, ft[name].float() - base_OI) for own, ft in self.finetunes.items())
        return contest(deltas, factors, self.norms[module], pattern)

    def _whole(self, merging: Merging) -> Iterator[tuple[str, Tensor]]:
        """The merge's weights; base and difference are added up in fp32."""
        difference = self.settings.sparse == "conflict_aware"
        for name, (tensor, mask_OI) in self._merged(merging):
            added = difference and mask_OI is not None
            yield name, self.base[name].float() + tensor if added else tensor

    @cached_property
    def _merge_inputs(self) -> dict[str, Any]:
        return self._inputs(parameters=self.merging.parameters)

    @cached_property
    def dense(self) -> Path:
        """The merge in whole weights: all of it, or before it is pruned or rounded."""

        def make(scratch: Path) -> None:
            with new_folder(scratch / "model") as model:
                write_dense(model, self.base, self._whole(self.merging))

        return self.stages.run("dense-merge", self._merge_inputs, make) / "model"

    @cached_property
    def packed(self) -> Path:
        """The merge by masks that are known before, floating-point values, with `places.json`."""

        def make(scratch: Path) -> None:
            places: Counter[str] = Counter()
            with new_folder(scratch / "model") as model:
                write_packed(
                    model,
                    self.base,
                    self._merged(self.merging, places),
                    self.modules,
                    self.floats,
                    task_vector=self.settings.sparse == "conflict_aware",
                )
            shares = {name: count / places.total() for name, count in places.items()}
            write_json(scratch / "places.json", shares)

        return self.stages.run("packed-merge", self._merge_inputs, make) / "model"

    @cached_property
    def made(self) -> Path:
        """Folder of the finished merge: `model` and `facts.json`."""
        return self.stages.run("merged", self._merge_inputs, self._make)

    def _make(self, scratch: Path) -> None:
        model, mode = scratch / "model", self.settings.sparse
        facts: dict[str, Any] = {"dense_bytes": stored_bytes(self.base)}
        if mode == "none":
            shutil.copytree(self.dense, model)
            facts["bytes"] = stored_bytes(Checkpoint(model))
        else:
            self._sparse(model)
            facts |= verified(model, self.base, self.modules, self.pruning.pattern)
        if mode == "conflict_aware":
            facts["places"] = read_json(self.packed.parent / "places.json")
            facts["base_bytes"] = stored_bytes(self.base)
        write_json(scratch / "facts.json", facts)

    def _sparse(self, model: Path) -> None:
        """Prune the dense merge, or take the packed one, integers rounded on calibration text."""
        mode, settings = self.settings.sparse, self.pruning
        if mode == "reprune":
            prune(self.dense, model, self.texts, settings, self.progress, work=self.work)
        elif settings == self.floats:
            shutil.copytree(self.packed, model)
        else:
            prune(
                self.dense if mode == "conflict_aware" else self.packed,
                model,
                self.texts,
                replace(settings, refit_steps=0, recovery=None),
                self.progress,
                base=self.base.folder if mode == "conflict_aware" else None,
                masks=self.packed,
                work=self.work,
            )
