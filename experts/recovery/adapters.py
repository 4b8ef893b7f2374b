"""Merge an existing PEFT LoRA adapter into a packed model, the masks kept.

O out features, I in features.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.experts.checkpoint import ADAPTER
from moiety.experts.recovery.masked_lora import quiet_peft
from moiety.experts.recovery.student import Student, open_student, write_report
from moiety.files import check_new_folder, new_folder

UNMERGEABLE = {
    "use_dora": "DoRA rescales whole columns of the weight it was trained on",
    "lora_bias": "the packed model may have no bias to add to",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of the embeddings",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations under which the adapter's base is not the finetune but what is left of it."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `merge_lora` did; also `recovery.json` beside the weights.

    `dropped` is the share of the update that the masks removed: the Frobenius norm of what was
    removed over that of the whole update, over all packed matrices; `matrices` has each one's.
    `whole` names the unpacked matrices that took their update whole.
    """

    adapter: str
    sparse: str
    dropped: float
    matrices: dict[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return {"method": "merge_lora", **asdict(self)}


def merge_lora(sparse: str | Path, adapter: str | Path, out: str | Path) -> MergeReport:
    """Merge a PEFT LoRA into a packed model as W + (update ⊙ mask); write a packed model to `out`.

    `adapter` is a folder with `adapter_config.json`, trained on the dense finetune or on the
    pruned model. One that was trained without the mask loses what falls outside it: see the
    report. Raises InputError for other adapters than plain LoRA on linear layers, or one that
    does not fit; OutputError when `out` is not free.
    """
    check_new_folder(Path(out))
    _check_adapter(Path(adapter))
    student = open_student(sparse)
    values, others, report = _merged(student, _updates(student, Path(adapter)), str(adapter))
    with new_folder(Path(out)) as scratch:
        student.write(scratch, values, others)
        write_report(scratch, report.to_dict())
    return report


def _check_adapter(adapter: Path) -> None:
    if not (adapter / ADAPTER).is_file():
        raise InputError(f"expected a PEFT adapter in {adapter}, but it has no {ADAPTER}")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(
            f"expected adapter_model.safetensors in {adapter}, but there is none; only "
            "safetensors adapters are read, so save it again with PEFT"
        )
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise InputError(f"expected a LoRA adapter in {adapter}, but it is {config.peft_type}")
    for name, reason in UNMERGEABLE.items():
        if getattr(config, name, None):
            raise InputError(
                f"expected a plain LoRA adapter in {adapter}, but it has {name}: {reason}; "
                "merge it into the dense finetune and prune that"
            )
    if str(config.init_lora_weights).startswith(CHANGES_BASE):
        raise InputError(
            f"expected an adapter of the finetune itself in {adapter}, but its "
            f"{config.init_lora_weights} initialisation changed the weights under it; convert it "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


@torch.no_grad()
def _updates(student: Student, adapter: Path) -> dict[str, Tensor]:
    """The change of each weight (O, I) that the adapter makes, by module name."""
    modules = {id(module): name for name, module in student.network.named_modules()}
    try:
        with warnings.catch_warnings(), quiet_peft():
            warnings.filterwarnings("error", "Found missing adapter keys")
            network = PeftModel.from_pretrained(student.network, str(adapter))
    except (ValueError, RuntimeError, KeyError, Warning) as error:
        raise InputError(
            f"expected an adapter of this model in {adapter}, but: {' '.join(str(error).split())}"
        ) from error
    updates: dict[str, Tensor] = {}
    for layer in network.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        name = modules[id(base)]
        _check_layer(student, name, layer)
        updates[name] = cast(Any, layer).get_delta_weight(network.active_adapter).float()
    return updates


def _check_layer(student: Student, name: str, layer: LoraLayer) -> None:
    kind = type(layer.get_base_layer()).__name__
    reason = None
    if not isinstance(layer.get_base_layer(), nn.Linear):
        reason = f"it is of type {kind}"
    elif layer.lora_variant:
        reason = f"it is a {type(next(iter(layer.lora_variant.values()))).__name__}"
    elif f"{name}.weight" not in student.view:
        reason = "its weight is tied to another one, which would change too"
    if reason is not None:
        raise InputError(
            f"expected plain LoRA on linear layers, but on {name} {reason}; "
            "merge the adapter into the dense finetune and prune that"
        )


def _merged(
    student: Student, updates: Mapping[str, Tensor], adapter: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], MergeReport]:
    values: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    matrices: dict[str, float] = {}
    removed, total = 0.0, 0.0
    for name, update_OI in sorted(updates.items()):
        weight_OI = student.view[f"{name}.weight"].float() + update_OI
        if name not in student.matrices:
            others[f"{name}.weight"] = weight_OI
            continue
        mask_OI = student.matrices[name].mask_OI
        values[name] = weight_OI.masked_select(mask_OI)
        lost = float(update_OI.masked_fill(mask_OI, 0).square().sum(dtype=torch.float64))
        whole = float(update_OI.square().sum(dtype=torch.float64))
        matrices[name] = math.sqrt(lost / whole) if whole else 0.0
        removed, total = removed + lost, total + whole
    report = MergeReport(
        adapter=adapter,
        sparse=str(student.folder),
        dropped=math.sqrt(removed / total) if total else 0.0,
        matrices=matrices,
        whole=tuple(sorted(others)),
    )
    return values, others, report
