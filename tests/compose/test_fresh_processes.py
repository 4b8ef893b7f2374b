"""Composites open in processes that have not seen moiety yet, in whatever order it is imported.

Importing torch and transformers is what costs time, so one process does that once and forks.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moiety.compose import Recipe, build

KINDS: dict[str, dict[str, Any]] = {
    "mixture": {"kind": "mixture", "shared": "base"},
    "routed": {"kind": "routed", "shared": "base"},
    "ensemble": {"kind": "ensemble"},
}
CLASSES = {
    "mixture": ("MixtralForCausalLM", "transformers.models.mixtral.modeling_mixtral"),
    "routed": ("RoutedLlamaForCausalLM", "moiety.compose.routed.model"),
    "ensemble": ("EnsembleForCausalLM", "moiety.compose.ensemble.model"),
}
PACKED = {
    "mixture": ("SparseExperts", 2),
    "routed": ("RoutedLinear", 2 * 7),
    "ensemble": ("SparseLinear", 3 * 2 * 7),
}
OPENING = """
{start}
import sys
from transformers import AutoModelForCausalLM
assert {trusted} == ('moiety' not in sys.modules)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code={trusted})
found = type(model).__name__, type(model).__module__
assert found == {expected}, found
packed = sum(type(module).__name__ == {packed!r} for module in model.modules())
assert packed == {count}, packed
model.save_pretrained({again!r})
"""
FORKING = """
import os, sys
import transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
for code in sys.argv[1:]:
    assert 'moiety' not in sys.modules
    child = os.fork()
    if child == 0:
        exec(code, {'__name__': '__main__'})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, code
"""


@pytest.fixture(scope="module")
def folders(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fresh")
    quick = {"prune": {"method": "magnitude", "refit_steps": 0}, "route": {"train_steps": 0}}
    for kind, compose in KINDS.items():
        recipe = Recipe.model_validate(world.recipe(compose=compose, **quick))
        build(recipe, folder / kind, work=folder / "stages", check=False)
    return {kind: folder / kind for kind in KINDS}


def opening(kind: str, folder: Path, again: Path, start: str) -> str:
    """Code that opens a composite, through its shim if `start` imports nothing."""
    packed, count = PACKED[kind]
    return OPENING.format(
        start=start,
        trusted=not start,
        folder=str(folder),
        again=str(again),
        expected=CLASSES[kind],
        packed=packed,
        count=count,
    )


def run(folder: Path, *arguments: str) -> None:
    """Run a process in a folder where no moiety lies; what it says when it fails is told."""
    done = subprocess.run(
        [sys.executable, "-c", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_moiety_after_transformers_or_only_the_shim(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    cases = {
        (kind, start): tmp_path / f"{kind}-{len(start)}"
        for kind in KINDS
        for start in ("import moiety", "")
    }
    run(tmp_path, FORKING, *(opening(k, folders[k], again, s) for (k, s), again in cases.items()))
    for (kind, _), again in cases.items():
        weights, expected = again / "model.safetensors", folders[kind] / "model.safetensors"
        assert weights.stat().st_size == expected.stat().st_size
        fields = json.loads((again / "config.json").read_text())
        assert fields["quantization_config"]["quant_method"] == "moiety"
        if kind != "mixture":
            assert (again / "moiety_shim.py").is_file()
            assert fields["auto_map"]["AutoConfig"].startswith("moiety_shim.")


def test_moiety_before_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    start = "import moiety, transformers"
    run(tmp_path, opening("mixture", folders["mixture"], tmp_path / "again", start))
