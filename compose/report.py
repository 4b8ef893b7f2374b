"""What a build tells of itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BuildReport:
    """Where everything is and what was chosen; also written to `build.json` in the composite.

    `facts` depend on the kind, such as `shared` (where the shared part comes from) and
    `gate_parameters` (all that was trained); `tensors` says where every tensor of every input went
    (moiety.compose.account).
    """

    key: str
    kind: str
    composite: Path
    experts: dict[str, Path]
    facts: dict[str, Any]
    seconds: dict[str, float]
    invariants: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        experts = {name: str(path) for name, path in self.experts.items()}
        return {**vars(self), "composite": str(self.composite), "experts": experts}
