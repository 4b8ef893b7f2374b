"""What a finetune may be given as: a full model, or a PEFT adapter that is merged into its base."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moiety.errors import InputError
from moiety.experts.checkpoint import ADAPTER, Checkpoint, digest_of_model, local_folder
from moiety.experts.quantizer import check_complete
from moiety.files import digest, new_folder, read_json
from moiety.progress import SILENT, Progress

ADAPTER_WEIGHTS = "adapter_model.safetensors"
CAUSAL = "CAUSAL_LM"
EMBEDDINGS = re.compile(r"\.(embed_tokens|embed_in|wte)(\.base_layer)?\.weight$")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def resolve(
    model: str | Path,
    work: str | Path,
    base: str | Path | None = None,
    progress: Progress = SILENT,
) -> Path:
    """The folder of a full model: `model`'s own, or its adapter merged into its base in `work`.

    `model` is a folder or a hub id. When it holds an adapter (`adapter_config.json`), PEFT merges
    it into `base`, by default the one that the adapter names, in the base's dtype; the result is
    named by the contents of both, so that it is made once. The tokenizer is the adapter's where
    it has one, else the base's. Raises InputError when the base is absent, quantised or another
    one, or the adapter is no kind that can be merged.
    """
    folder = local_folder(model)
    if not (folder / ADAPTER).is_file():
        return folder
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{folder} is a PEFT adapter, but peft is not installed; install peft")
    config = read_json(folder / ADAPTER)
    _check_adapter(folder, config)
    base_folder = _base_folder(folder, config, base)
    name = digest([digest_of_model(folder), digest_of_model(base_folder)])
    final = Path(work) / f"merged-{name}"
    if final.is_dir():
        return final
    progress.note(f"merging the adapter {model} into {base_folder}")
    with new_folder(final) as scratch:
        _merged(folder, base_folder).save_pretrained(scratch)
        _tokenizer(folder, base_folder).save_pretrained(scratch)
    return final


def _check_adapter(folder: Path, config: Any) -> None:
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind is None:
        raise InputError(f"expected a peft_type in {folder / ADAPTER}, but there is none")
    if config.get("task_type") not in (None, CAUSAL):
        raise InputError(
            f"expected an adapter of a causal language model in {folder}, "
            f"but it is for {config['task_type']}"
        )
    if config.get("megatron_config"):
        raise InputError(
            f"expected an adapter of a transformers model in {folder}, but it is Megatron's"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"expected {ADAPTER_WEIGHTS} in {folder}, but there is none; only safetensors "
            "adapters are read, so save it again with PEFT's save_pretrained"
        )


def _base_folder(folder: Path, config: dict[str, Any], base: str | Path | None) -> Path:
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise InputError(f"expected {folder / ADAPTER} to name its base, but it does not; give one")
    try:
        checkpoint = Checkpoint(base)
    except InputError as error:
        raise InputError(
            f"the base of the adapter {folder} cannot be read: {error}; give another as its base"
        ) from error
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise InputError(
            f"expected a full-precision base for the adapter {folder}, but {base} is quantised; "
            "give the model that it was made from as its base"
        )
    return checkpoint.folder


def _merged(folder: Path, base_folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype="auto")
    check_complete(model)
    held = _tensors(folder)
    rows = _vocabulary(held)
    if rows not in (None, model.get_input_embeddings().num_embeddings):
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _merge(model, folder, held)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the adapter {folder} cannot be merged into {base_folder}: {reason}"
        ) from error


def _merge(
    model: PreTrainedModel, folder: Path, held: dict[str, tuple[int, ...]]
) -> PreTrainedModel:
    """The model with the adapter in its weights; refuses one of which PEFT skips tensors."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    if adapted.active_peft_config.is_prompt_learning:
        raise InputError(
            f"expected an adapter that can be merged into weights, such as LoRA, but {folder} "
            f"is {adapted.active_peft_config.peft_type}"
        )
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    unknown = sorted(set(held) - expected - set(adapted.state_dict()))
    missing = sorted(expected - set(held))
    if unknown or missing:
        odd = f"has no place for {unknown[0]}" if unknown else f"also needs {missing[0]}"
        raise InputError(
            f"the adapter {folder} is incomplete or belongs to another base: this base {odd}"
        )
    _untie(adapted.get_base_model())
    return cast(PreTrainedModel, adapted.merge_and_unload(safe_merge=True))


def _untie(model: Any) -> None:
    """Give the head its own weight if it or the embeddings have an adapter.

    PEFT would merge into the weight that both use: one's adapter into the other as well, or the
    adapter of a tied pair twice.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not any(isinstance(part, BaseTunerLayer) for part in (head, embedding)):
        return
    head, embedding = (getattr(part, "base_layer", part) for part in (head, embedding))
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    file = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(file, "pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a safetensors file at {file}, but: {error}") from error


def _vocabulary(held: dict[str, tuple[int, ...]]) -> int | None:
    """Rows of the embeddings that the adapter holds in full, as it does after adding tokens."""
    rows = [shape[0] for name, shape in held.items() if EMBEDDINGS.search(name)]
    return rows[0] if rows else None


def _tokenizer(folder: Path, base_folder: Path) -> Any:
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return AutoTokenizer.from_pretrained(folder if own else base_folder)
