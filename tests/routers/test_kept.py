"""Statistics kept from one fit to the next: an added domain is read alone, anything else anew."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moiety.errors import InputError
from moiety.progress import Item, Silent
from moiety.routers import GateStatistics, collect, find_gates
from moiety.routers.fit import FitSettings
from moiety.routers.kept import collect_or_keep

SETTINGS = FitSettings(minimum_tokens=1, batch_size=4)


class Hearing(Silent):
    """A listener that knows whose text was read."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Hear of long work."""
        self.heard.append(description.rpartition(" ")[2])
        yield from items


def read(
    toys: ModuleType,
    folder: Path,
    names: Iterable[str],
    settings: FitSettings = SETTINGS,
    **more: int,
) -> tuple[list[GateStatistics], list[str]]:
    """Statistics of these domains, and those that were read for them."""
    model, texts, hearing = toys.mixtral(**more), toys.domains(8), Hearing()
    data = {name: texts[name] for name in names}
    found = collect_or_keep(folder, model, find_gates(model), data, toys.OWN, settings, hearing)
    return found, hearing.heard


def test_an_added_domain_is_read_alone(toys: ModuleType, tmp_path: Path) -> None:
    assert read(toys, tmp_path, ["law", "code"])[1] == ["law", "code"]
    found, heard = read(toys, tmp_path, ["law", "code", "poems"])
    assert heard == ["poems"]
    again, heard = read(toys, tmp_path, ["law", "code", "poems"])
    assert heard == []
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one.gram_WW, other.gram_WW)
        assert torch.equal(one.sum_EW, other.sum_EW)
    model = toys.mixtral()
    alone = collect(
        model,
        find_gates(model),
        toys.domains(8),
        toys.OWN,
        only=["poems"],
        stitch=SETTINGS.stitch,
        shortest=SETTINGS.shortest,
        tokens=SETTINGS.tokens,
        batch_size=4,
    )
    for one, other in zip(found, alone, strict=True):
        own = toys.OWN["poems"]
        torch.testing.assert_close(one.sum_EW[own], other.sum_EW[own])


@pytest.mark.parametrize("change", ["model", "settings", "gone"])
def test_what_no_longer_holds_is_read_again(toys: ModuleType, tmp_path: Path, change: str) -> None:
    read(toys, tmp_path, ["law", "code", "poems"])
    names, settings, seed = ["law", "code", "poems"], SETTINGS, 0
    if change == "model":
        seed = 1
    elif change == "settings":
        settings = FitSettings(minimum_tokens=1, batch_size=4, seed=1)
    else:
        names = ["law", "code"]
    assert read(toys, tmp_path, names, settings, seed=seed)[1] == names


def test_a_damaged_folder_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    read(toys, tmp_path, ["law", "code"])
    (tmp_path / "sums" / "statistics.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="as they were written"):
        read(toys, tmp_path, ["law", "code"])
