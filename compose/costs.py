"""Rough costs of building: bytes from shapes, seconds from operations and a measured speed.

O/I out/in features, T tokens.
"""

import time
from dataclasses import dataclass
from math import prod

import torch

from moiety.compose.preflight.matrices import pruned_matrices
from moiety.compose.recipe import Merge, Mixture, Recipe, Routed
from moiety.compose.shared import CHOICE_WINDOWS, WEIGHTS, candidates
from moiety.experts import packing
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.pattern import Pattern
from moiety.routers.spec import LEARNED

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
FP32 = 4
SIDE = 768
MEASURED_SECONDS = 0.1
ATTAINED = 0.4
"""Share of the measured matrix-product speed that whole stages reach: norms, attention, copies."""
PASSES = {"magnitude": 0, "wanda": 2, "ria": 2, "sparsegpt": 2, "alps": 2}
SOLVES = {"magnitude": 0.0, "wanda": 0.0, "ria": 0.0, "sparsegpt": 1.0, "alps": 30.0}
"""Rounds of work of order O·I² a matrix that a method needs to choose its mask."""
KEPT_STATES = 20
"""Tensors of the hidden states' size that a layer keeps for the backward pass, about."""
TRAINED_BATCHES = 3
"""A backward pass costs about two forward ones."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one recipe's base and of one expert made from it.

    `matrices` are the pruned ones by module; `rest` is what an expert keeps dense.
    """

    matrices: dict[str, tuple[int, int]]
    dense: int
    matrices_dense: int
    matrices_packed: int
    weights: int
    block_fp32: int
    gram_fp32: int
    routed_layers: int
    width: int
    word: int

    @property
    def rest(self) -> int:
        """Bytes of everything that is not pruned."""
        return self.dense - self.matrices_dense

    @property
    def expert(self) -> int:
        """Bytes of one pruned finetune."""
        return self.rest + self.matrices_packed


def sizes_of(recipe: Recipe, base: Checkpoint) -> Sizes:
    """From the headers of the base's files and the recipe's pattern, values and sites."""
    stored = base.shapes()
    bytes_of = {name: prod(shape) * WIDTHS.get(dtype, 1) for name, (shape, dtype) in stored.items()}
    matrices = pruned_matrices(base.config, recipe.sites)
    layers = getattr(recipe.compose, "layers", "all")
    held = {name: shape for name, shape in matrices.items() if in_layers(name, layers)}
    blocks = max(1, getattr(base.config.get_text_config(), "num_hidden_layers", 1))
    weights = sum(prod(shape) for shape, _ in stored.values())
    return Sizes(
        matrices=matrices,
        dense=sum(bytes_of.values()),
        matrices_dense=sum(bytes_of.get(f"{name}.weight", 0) for name in held),
        matrices_packed=sum(packed_bytes(recipe, *shape) for shape in held.values()),
        weights=weights,
        block_fp32=FP32 * weights // blocks,
        gram_fp32=max((FP32 * columns**2 for _, columns in matrices.values()), default=0),
        routed_layers=blocks if layers == "all" else len(layers),
        width=getattr(base.config.get_text_config(), "hidden_size", 1),
        word=max(WIDTHS.get(dtype, 1) for _, dtype in stored.values()),
    )


def in_layers(name: str, layers: object) -> bool:
    """Whether a module stands in one of a recipe's `layers`: all, or a list of their numbers."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return not isinstance(layers, list) or (bool(numbers) and numbers[0] in layers)


def packed_bytes(recipe: Recipe, rows: int, columns: int) -> int:
    """Bytes of one matrix (O, I) as the recipe packs it."""
    pattern = Pattern.parse(recipe.prune.pattern)
    return packing.packed_bytes(pattern, recipe.prune.values, rows, columns)


def _gates_of(kind: Routed, layers: int) -> int:
    """Gate weights of a routed model, in gates of one layer that see the token alone."""
    spec = kind.router
    if spec.kind not in LEARNED:
        return 0
    gates = 2 * layers if kind.routers == "split" else -(-layers // kind.layers_of(layers))
    return gates * (1 + len(spec.horizons))


def composite_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes of the composite's weights, a base that it needs beside it included."""
    count, kind = len(recipe.experts), recipe.compose
    gates = sizes.word * sizes.routed_layers * count * sizes.width
    match kind:
        case Mixture():
            return sizes.rest + count * sizes.matrices_packed + gates
        case Routed():
            gates = gates // sizes.routed_layers * _gates_of(kind, sizes.routed_layers)
            stays = sizes.dense if kind.base == "dense" else sizes.rest
            return stays + count * sizes.matrices_packed + gates
        case Merge():
            if kind.sparse == "none":
                return sizes.dense
            kept = sizes.dense if kind.sparse == "conflict_aware" else sizes.rest
            return kept + sizes.matrices_packed
    return count * sizes.expert


def measured_speed() -> float:
    """Operations a second of an fp32 matrix product on this machine, the best of a few."""
    left, right = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    best, stop = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < stop or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


@dataclass(frozen=True)
class Work:
    """Operations of each stage of one recipe."""

    recipe: Recipe
    sizes: Sizes

    @property
    def tokens(self) -> int:
        """Calibration tokens of one domain, T."""
        return self.recipe.calibration_windows * self.recipe.context_length

    def forward(self, tokens: int) -> float:
        """One pass of a model of the base's size."""
        return 2.0 * self.sizes.weights * tokens

    @property
    def prune(self) -> float:
        """One finetune: passes over its text, Gram matrices, the mask, the refit."""
        settings, squares = self.recipe.prune, 0.0
        for rows, columns in self.sizes.matrices.values():
            rounds = SOLVES[settings.method] + settings.refit_steps
            squares += 2.0 * rounds * rows * columns**2 + 2.0 * self.tokens * columns**2
            squares += 2.0 * columns**3
        trained = 6 * self.forward(self.tokens) if settings.recover else 0.0
        return PASSES[settings.method] * self.forward(self.tokens) + squares + trained

    @property
    def pruning(self) -> int:
        """Bytes of memory that pruning takes: a block twice, its Gram matrices, hidden states."""
        states = 2 * FP32 * self.tokens * self.sizes.width
        return 2 * self.sizes.block_fp32 + 4 * self.sizes.gram_fp32 + states

    @property
    def activations(self) -> int:
        """Bytes of memory that a training batch takes beside the weights."""
        kept = self.sizes.routed_layers * KEPT_STATES
        return FP32 * self.recipe.batch_size * self.recipe.context_length * self.sizes.width * kept

    @property
    def weigh(self) -> float:
        """Scoring a merge on every domain for every weight tried."""
        return len(WEIGHTS) * self._choice

    @property
    def _choice(self) -> float:
        windows = min(CHOICE_WINDOWS, self.recipe.calibration_windows)
        return self.forward(windows * self.recipe.context_length) * len(self.recipe.experts)

    @property
    def shared(self) -> float:
        """Scoring every source of the shared part on every domain."""
        kind = self.recipe.compose
        tried = len(candidates(kind)) if isinstance(kind, Mixture | Routed) else 0
        return tried * self._choice if tried > 1 else 0.0

    @property
    def route(self) -> float:
        """The closed form on every domain, then training."""
        start = self.forward(self.tokens) * len(self.recipe.experts)
        batch = self.recipe.batch_size * self.recipe.context_length
        steps = self.recipe.route.train_steps
        return self._active * (start + steps * TRAINED_BATCHES * self.forward(batch))

    @property
    def _active(self) -> int:
        return getattr(self.recipe.compose, "top_k", 1)

    @property
    def evaluate(self) -> float:
        """Held-out text through each model and route of the table of controls."""
        models = 12 + 2 * len(self.recipe.experts)
        windows = self.recipe.evaluate.windows * self.recipe.context_length
        return self.forward(windows) * len(self.recipe.experts) * models
