"""The files of a model that are neither its weights nor its configuration."""

import shutil
from pathlib import Path

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation configuration and chat templates from one folder to another."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
