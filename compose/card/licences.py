"""What the models a composite is made of say about their licence."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
KNOWN_FORM = re.compile(r"[a-z0-9][a-z0-9.+-]*")
OTHER = "other"
README = "README.md"


@dataclass(frozen=True)
class Licence:
    """One statement: the hub's id of a licence, and the name that `other` needs."""

    id: str
    name: str | None = None

    def __str__(self) -> str:
        return self.id if self.name is None else f"{self.id} ({self.name})"

    @property
    def is_usable(self) -> bool:
        """Whether it is of a form that the hub's metadata takes."""
        return KNOWN_FORM.fullmatch(self.id) is not None and (self.name is None or bool(self.name))


def hub_id(model: str) -> str | None:
    """The hub id of a model that was given by one; None for folders."""
    is_id = HUB_ID.fullmatch(model) is not None and not Path(model).expanduser().exists()
    return model if is_id else None


def licence_of(model: str) -> Licence | None:
    """What a folder or hub id states in its README's front matter, else in its configuration."""
    card = _front_matter(_file(model, README))
    stated = card if "license" in card else _fields(_file(model, "config.json"))
    value, name = stated.get("license"), stated.get("license_name")
    if not isinstance(value, str) or not value.strip():
        return None
    return Licence(value.strip(), name.strip() if isinstance(name, str) else None)


def shared_licence(stated: Mapping[str, Licence | None]) -> Licence | None:
    """The licence that every model states; None when they differ or one states none."""
    (first, *others) = stated.values()
    same = first is not None and first.is_usable and all(one == first for one in others)
    return first if same else None


def _file(model: str, name: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(model, name))
    except (HFValidationError, HfHubHTTPError, OSError):
        return None


def _front_matter(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, UnicodeDecodeError, ValueError, TypeError, yaml.YAMLError):
        return {}


def _fields(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
