"""LoRA recovery: train a low-rank change of the kept values, and merge it with the mask kept."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from moiety.experts.recovery.masked_lora import MaskedLoraLinear, quiet_peft
from moiety.experts.recovery.session import open_session
from moiety.experts.recovery.settings import LoraSettings, RecoveryReport
from moiety.experts.recovery.student import Student
from moiety.progress import SILENT, Progress


def lora(
    sparse: str | Path,
    teacher: str | Path,
    data: str | Path | Sequence[str],
    out: str | Path,
    settings: LoraSettings | None = None,
    progress: Progress = SILENT,
) -> RecoveryReport:
    """Train a LoRA of the packed matrices towards the dense finetune and merge it, masks fixed.

    As `distill`, but only the low-rank factors train (PEFT's, see masked_lora for the one
    difference), which takes far less optimizer memory and can move the values less.
    """
    settings = settings or LoraSettings()
    session = open_session(sparse, teacher, data, out, settings)
    student = session.student
    network = adapted(student, settings)
    trained = {name: one for name, one in network.named_parameters() if one.requires_grad}
    rates = dict.fromkeys(trained, settings.rate)
    run = session.train(network, trained, rates, {}, progress)
    values = {}
    with torch.no_grad():
        for module, matrix in student.matrices.items():
            merged_OI = masked_layer(network, module).merged_weight().cpu()
            values[module] = merged_OI.masked_select(matrix.mask_OI)
    return session.finish("lora", run, values)


def adapted(student: Student, settings: LoraSettings) -> PeftModel:
    """The student with a masked LoRA on every packed matrix, which as yet changes nothing.

    There is no dropout: it would act on the layer's input, which the merged weight cannot.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=settings.rank_stabilised,
        target_modules=sorted(student.matrices),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    with torch.random.fork_rng(), quiet_peft():
        torch.manual_seed(settings.seed)
        network = get_peft_model(student.network, config)
    assert isinstance(network, PeftModel)
    for module, matrix in student.matrices.items():
        masked_layer(network, module).fix_mask(matrix.mask_OI, matrix.stored)
    return network


def masked_layer(network: PeftModel, module: str) -> MaskedLoraLinear:
    """The adapted layer of one packed matrix."""
    layer = network.get_base_model().get_submodule(module)
    assert isinstance(layer, MaskedLoraLinear)
    return layer
