"""Inventories of a model folder, a configuration alone, a hub id or a recipe."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from transformers import AutoConfig, PretrainedConfig

import moiety.compose.routed  # noqa: F401
from moiety.analysis.planner.formats import Format
from moiety.analysis.planner.inventory import EXPERTS, Inventory, Item, joined
from moiety.compose.card.sizes import OF_ONE_EXPERT
from moiety.compose.costs import composite_bytes, in_layers, sizes_of
from moiety.compose.recipe import Ensemble, Merge, Mixture, Recipe, Routed
from moiety.errors import InputError
from moiety.experts.anatomy import group_of
from moiety.experts.architecture import Architecture
from moiety.experts.checkpoint import INDEX, SINGLE, Checkpoint
from moiety.experts.quantizer import PackedConfig
from moiety.experts.write import ITEM_BYTES

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8"}
SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
MATRIX_PARTS = ("attention", "ffn")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "top_k")
RECIPES = (".yaml", ".yml")


def take_stock(source: str | Path) -> Inventory:
    """The inventory of a recipe, a model folder, a `config.json` or a hub id; no weights are read.

    Raises InputError when it is none of these or cannot be understood.
    """
    path = Path(source).expanduser()
    if path.suffix in RECIPES:
        return of_recipe(Recipe.read(path))
    if path.is_dir() and any((path / name).is_file() for name in (SINGLE, INDEX)):
        checkpoint = Checkpoint(path)
        return of_shapes(str(source), checkpoint.config, checkpoint.shapes())
    if path.exists():
        config = _config(path)
        return of_shapes(str(source), config, _stock_shapes(config))
    return _of_hub(str(source))


def _config(source: Path | str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected a recipe, a model folder, its config.json or a hub id, but {source} gave: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _stock_shapes(config: PretrainedConfig) -> Shapes:
    dtype = SAFETENSORS.get(getattr(config, "dtype", None) or torch.bfloat16, "BF16")
    return {name: (shape, dtype) for name, shape in Architecture(config).shapes.items()}


def _of_hub(name: str) -> Inventory:
    """From the headers of a repository's weight files, or its configuration where there are none."""
    config = _config(name)
    try:
        files = huggingface_hub.get_safetensors_metadata(name).files_metadata.values()
    except (HfHubHTTPError, NotASafetensorsRepoError, OSError):
        return of_shapes(name, config, _stock_shapes(config))
    shapes = {
        tensor: (tuple(info.shape), str(info.dtype))
        for file in files
        for tensor, info in file.tensors.items()
    }
    return of_shapes(name, config, shapes)


def of_shapes(name: str, config: PretrainedConfig, shapes: Shapes) -> Inventory:
    """The inventory of tensors with these shapes and dtypes."""
    total, active = _experts(config)
    ensemble = config.model_type == "moiety_ensemble"
    return Inventory(
        name=name,
        items=tuple(joined(_items(shapes, _packing(config), ensemble))),
        config=config.get_text_config(),
        experts=total,
        active=total if ensemble else active,
        caches=total if ensemble else 1,
    )


def _packing(config: PretrainedConfig) -> PackedConfig | None:
    try:
        return PackedConfig.of(config)
    except InputError:
        return None


def _items(shapes: Shapes, packed: PackedConfig | None, ensemble: bool) -> Iterator[Item]:
    for name, (shape, dtype) in shapes.items():
        if name.endswith(("_mask", "_scale")) and name.rpartition("_")[0] in shapes:
            continue
        mask = shapes.get(f"{name}_mask")
        parts = [shapes[one] for one in (name, f"{name}_mask", f"{name}_scale") if one in shapes]
        group = group_of(name)
        expert = name.startswith("experts.") if ensemble else bool(OF_ONE_EXPERT.search(name))
        yield Item(
            part=EXPERTS if expert and not ensemble else group,
            shape=shape if mask is None else (*mask[0][:-1], 8 * mask[0][-1]),
            kind=_kind(dtype, packed if mask is not None else None),
            stored=sum(prod(size) * ITEM_BYTES.get(kind, 1) for size, kind in parts),
            matrix=(len(shape) > 1 and group in MATRIX_PARTS) or mask is not None,
            expert=expert,
        )


def _kind(dtype: str, packed: PackedConfig | None) -> str:
    name = NAMES.get(dtype, dtype.lower())
    return f"{packed.pattern} {packed.values or name}" if packed else f"dense {name}"


def _experts(config: PretrainedConfig) -> tuple[int, int]:
    """How many experts a model has, and how many of them a token uses."""
    text, own = config.get_text_config(), getattr(config, "moiety", None) or {}
    router = own.get("router") or {}
    if "architecture" in own or config.model_type == "moiety_ensemble":
        total = len(own.get("experts", ()))
        return total, min(total, int(router.get("top_k") or total))
    total = next((n for name in COUNTS if (n := getattr(text, name, None))), 0)
    chosen = next((n for name in CHOSEN if (n := getattr(text, name, None))), total)
    return int(total), min(int(total), int(chosen))


def of_recipe(recipe: Recipe) -> Inventory:
    """What building a recipe would give, from the headers of its base's files."""
    base = Checkpoint(recipe.base)
    sizes, kind = sizes_of(recipe, base), recipe.compose
    layers = getattr(kind, "layers", "all")
    matrices = {f"{name}.weight" for name in sizes.matrices if in_layers(name, layers)}
    dense = list(_items(base.shapes(), None, ensemble=False))
    named = dict(zip(base.shapes(), dense, strict=True))
    rest = [item for name, item in named.items() if name not in matrices]
    held = [item for name, item in named.items() if name in matrices]
    items = list(_composed(recipe, rest, held))
    gates = composite_bytes(recipe, sizes) - sum(item.bytes_in(None) for item in items)
    if gates:
        items.append(_gates(gates, sizes.word))
    count = 0 if isinstance(kind, Merge) else len(recipe.experts)
    ensemble = isinstance(kind, Ensemble)
    return Inventory(
        name=str(recipe.compose.kind),
        items=tuple(joined(items)),
        config=base.config.get_text_config(),
        experts=count,
        active=count if ensemble else min(count, getattr(kind, "top_k", 1)),
        caches=count if ensemble else 1,
    )


def _composed(recipe: Recipe, rest: list[Item], held: list[Item]) -> Iterator[Item]:
    """The tensors of a composite, by its kind; see `composite_bytes`."""
    kind, count = recipe.compose, len(recipe.experts)
    form = Format(recipe.prune.values, recipe.prune.pattern)
    match kind:
        case Mixture():
            yield from [*rest, *_packed(held, form, count, EXPERTS)]
        case Routed():
            yield from [*rest, *(held if kind.base == "dense" else [])]
            yield from _packed(held, form, count, EXPERTS)
        case Merge():
            stays = kind.sparse in ("none", "conflict_aware")
            yield from [*rest, *(held if stays else [])]
            yield from _packed(held, form, 1, None) if kind.sparse != "none" else ()
        case _:
            yield from (Item(**{**vars(item), "copies": count, "expert": True}) for item in rest)
            for item in _packed(held, form, count, None):
                yield Item(**{**vars(item), "expert": True})


def _packed(held: list[Item], form: Format, copies: int, part: str | None) -> Iterator[Item]:
    for item in held:
        changed = {
            "part": part or item.part,
            "kind": form.name,
            "stored": form.bytes_of(item.shape),
            "expert": part == EXPERTS,
            "copies": copies,
        }
        yield Item(**{**vars(item), **changed})


def _gates(size: int, word: int) -> Item:
    return Item(part="router", shape=(size // word,), kind="gates", stored=size)
