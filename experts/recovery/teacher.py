"""The dense model that a student learns from, and whether it fits."""

from pathlib import Path

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.preflight import load_tokenizer
from moiety.experts.quantizer import PackedConfig
from moiety.experts.recovery.student import Student

SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


def check_teacher(teacher: str | Path, student: Student) -> Path:
    """The folder of a teacher (folder or hub id) that fits the student.

    Raises InputError when it is packed, has another shape or another tokenizer.
    """
    checkpoint = Checkpoint(teacher)
    if PackedConfig.of(checkpoint.config) is not None:
        raise InputError(
            f"expected the dense finetune as teacher, but {checkpoint.folder} is packed; "
            "give the model that was pruned"
        )
    for name in SAME:
        own, other = _field(student.network.config, name), _field(checkpoint.config, name)
        if own != other:
            raise InputError(
                f"expected a teacher with {name} {own}, as the pruned model has, "
                f"but it is {other}; give the model that was pruned"
            )
    tokenizer = load_tokenizer(checkpoint.folder)
    if tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise InputError(
            f"expected the teacher in {checkpoint.folder} to have the pruned model's tokenizer, "
            "but their vocabularies differ; give the model that was pruned"
        )
    return checkpoint.folder


def open_teacher(folder: Path) -> PreTrainedModel:
    """The teacher in its own dtype, frozen."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return network.eval().requires_grad_(False)


def _field(config: PretrainedConfig, name: str) -> object:
    return getattr(config.get_text_config(), name, None)
