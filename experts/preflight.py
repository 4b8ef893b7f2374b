"""What pruning refuses before any long work: inputs that do not fit each other.

W windows, C context length.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from moiety.errors import InputError
from moiety.experts.calibrate import linears_of
from moiety.experts.checkpoint import ADAPTER, Checkpoint, local_folder
from moiety.experts.delta import base_of
from moiety.experts.pattern import Pattern
from moiety.experts.settings import PruneSettings
from moiety.experts.stream import StreamedModel
from moiety.experts.unpack import DenseView
from moiety.text import Windows

Headers = dict[str, tuple[tuple[int, ...], str]]
SHAPE_FIELDS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")


def load_tokenizer(folder: Path) -> Any:
    """A model folder's tokenizer; InputError when it has none that opens."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].strip(" :")
        raise InputError(
            f"expected a tokenizer in {folder}, but: {reason}; copy that of its base there"
        ) from error


def check_vocabulary(windows: Windows, config: PretrainedConfig, folder: Path) -> None:
    """Raise InputError when token ids (W, C) go beyond the model's embeddings."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    largest = int(windows.ids_WC.max())
    if isinstance(rows, int) and largest >= rows:
        raise InputError(
            f"expected token ids below {rows}, the vocab_size of {folder}, but its tokenizer gives "
            f"{largest}; it belongs to another model"
        )


def check_combination(settings: PruneSettings, base: Any, masks: Any) -> None:
    """Raise InputError when settings, a base and given masks (None: none) exclude each other."""
    for name, given in (("base", base), ("masks", masks)):
        if given is not None and settings.schedule:
            raise InputError(f"expected a schedule or {name}, not both; leave one of them out")
    if base is not None and settings.recovery is not None:
        raise InputError(
            "expected recovery to train whole weights, but with a base only task vectors are "
            "stored; prune without recovery"
        )
    if masks is not None and settings.allocation != "uniform":
        raise InputError(
            f"expected allocation uniform with given masks, but it is {settings.allocation}; "
            "the masks already fix the density of every block"
        )


def check_base(model: DenseView, base: DenseView) -> None:
    """Raise InputError when `base` is no model that `model` may have been finetuned from."""
    if base_of(base.raw.config) is not None:
        raise InputError(
            f"expected whole weights in the base {base.folder}, but it is a task vector; "
            "export it dense first"
        )
    if base.folder.resolve() == model.folder.resolve():
        raise InputError(
            f"expected the base that {model.folder} was finetuned from, but it is that model "
            "itself; every difference would be 0"
        )
    check_same_shape(base.folder, model.folder)


def check_same_shape(base: str | Path, model: str | Path) -> None:
    """Raise InputError when a finetune's configuration is that of another architecture.

    Adapters take their base's configuration and are not looked at.
    """
    folder = local_folder(model)
    if (folder / ADAPTER).is_file():
        return
    ours, theirs = (Checkpoint(one).config.get_text_config() for one in (base, folder))
    for field in SHAPE_FIELDS:
        wanted, found = getattr(ours, field, None), getattr(theirs, field, None)
        if wanted != found:
            raise InputError(
                f"expected {model} to have {field} {wanted}, as the base {base} has, but it has "
                f"{found}; give the model that it was finetuned from"
            )


def check_matrices(
    stream: StreamedModel, settings: PruneSettings, base: DenseView | None, masks: DenseView | None
) -> None:
    """Refuse what would fail in some later block, from shapes alone; InputError names it."""
    pattern, found = Pattern.parse(settings.pattern), False
    of_base = {} if base is None else base.raw.shapes()
    of_masks = {} if masks is None else masks.raw.shapes()
    for index, block in enumerate(stream.blocks):
        for module, linear in linears_of(block, settings.sites).items():
            found, name = True, stream.name(index, module)
            shape = (linear.out_features, linear.in_features)
            try:
                pattern.check_width(linear.in_features)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
            if masks is not None:
                _check_mask(f"{name}.weight", masks, of_masks, pattern, shape)
            if base is not None:
                _check_weight(f"{name}.weight", base, of_base, shape)
    if not found:
        raise InputError(
            f"expected linear layers at sites {settings.sites} in the blocks of "
            f"{type(stream.model).__name__}, but there are none; name others (only nn.Linear "
            "layers can be pruned, not the Conv1D of GPT-2)"
        )


def check_values(stream: StreamedModel, settings: PruneSettings, model: DenseView) -> None:
    """Refuse other values than those of matrices that stay as they were packed before."""
    before = model.packing
    if before is None or before.values == settings.values:
        return
    pruned = {
        stream.name(index, module)
        for index, block in enumerate(stream.blocks)
        for module in linears_of(block, settings.sites)
    }
    if set(before.modules) - pruned:
        raise InputError(
            f"expected matrices that were packed before to hold {settings.values} values, but they "
            f"hold {before.values or 'others'}; prune with those values, or all of them again"
        )


def _check_mask(
    name: str, masks: DenseView, shapes: Headers, pattern: Pattern, shape: tuple[int, int]
) -> None:
    other = masks.packed.get(name)
    if other != pattern:
        raise InputError(
            f"expected a mask for {name} of pattern {pattern} in {masks.folder}, "
            f"but it has {'none' if other is None else f'one of {other}'}; "
            "prune it at the same sites and with the same pattern"
        )
    rows, columns = shape
    _check_shape(
        f"{name}_mask in {masks.folder}", shapes[f"{name}_mask"][0], (rows, -(-columns // 8))
    )


def _check_weight(name: str, base: DenseView, shapes: Headers, shape: tuple[int, int]) -> None:
    if name not in base:
        raise InputError(
            f"expected {name} in the base {base.folder}, but it has none; "
            "is it the model that was finetuned?"
        )
    found = tuple(base[name].shape) if name in base.packed else shapes[name][0]
    _check_shape(f"{name} in the base {base.folder}", found, shape)


def _check_shape(what: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise InputError(
            f"expected {what} to have shape {tuple(expected)}, but it has {tuple(found)}; "
            "it is from another architecture"
        )
