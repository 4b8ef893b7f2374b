"""lm-eval tasks: the numbers by hand, every kind of model, the stock command, refusals."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from moiety.analysis.harness import Tasks, TaskSettings, run_tasks, tasks_table
from moiety.cli import main
from moiety.compose.building import build
from moiety.compose.opening import open_any
from moiety.compose.shim import write_shim
from moiety.errors import InputError
from moiety.experts import PruneSettings, prune
from moiety.experts.export import export_dense
from moiety.text import read_documents

pytest.importorskip("lm_eval", reason='lm-eval is not installed; pip install "moiety[eval]"')

CHOICE = "next_word"
ROLLING = "running_text"
WORDS = ("alpha", "delta", "three", "purple", "kappa")
SETTINGS = PruneSettings(method="magnitude", refit_steps=0, context_length=32, windows=4)


@dataclass(frozen=True)
class Models:
    """One folder of every kind that tasks can be run on."""

    composite: Path
    export: Path
    packed: Path
    vector: Path


@pytest.fixture(scope="module")
def models(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("harness")
    build(world.write_recipe(folder / "recipe.yaml"), folder / "composite")
    export_dense(folder / "composite", folder / "export")
    config = AutoConfig.from_pretrained(folder / "composite")
    write_shim(folder / "composite", type(config))
    text = world.texts["letters"]["calibration"]
    finetune = world.finetunes["letters"]
    prune(finetune, folder / "packed", text, SETTINGS)
    prune(finetune, folder / "vector", text, SETTINGS, base=world.base)
    return Models(*(folder / name for name in ("composite", "export", "packed", "vector")))


@pytest.fixture(scope="module")
def tasks(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = read_documents(world.texts["letters"]["heldout"])[:8]
    rows = [
        {
            "start": " ".join(text.split()[:6]),
            "choices": [f" {text.split()[6]}", *(f" {word}" for word in WORDS)],
            "text": " ".join(text.split()[:12]),
        }
        for text in texts
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    choice = {
        "task": CHOICE,
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "task": ROLLING,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    elsewhere = {**common, **choice, "task": "elsewhere", "dataset_path": "nobody/nothing"}
    del elsewhere["dataset_kwargs"]
    for task in ({**common, **choice}, {**common, **rolling}, elsewhere):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@torch.no_grad()
def choices_by_hand(model: Any, tokenizer: Any, tasks: Path) -> list[float]:
    """Whether the first choice is the likeliest, document by document."""
    right = []
    for line in (tasks / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = tokenizer(row["start"])["input_ids"]
        nats = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["start"] + choice)["input_ids"]])
            logs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            picked = logs.gather(1, ids[0, 1:, None])[len(start) - 1 :]
            nats.append(float(picked.sum()))
        right.append(float(nats[0] == max(nats)))
    return right


def test_scores_are_those_computed_by_hand(models: Models, tasks: Path) -> None:
    opened = open_any(models.composite)
    right = choices_by_hand(opened.model, opened.tokenizer, tasks)
    assert 0 < sum(right) < len(right)
    for limit in (None, 5):
        [score] = run_tasks(opened, [CHOICE], TaskSettings(limit=limit), include_path=tasks)
        part = torch.tensor(right[:limit])
        assert (score.task, score.label, score.shots) == (CHOICE, "acc", 0)
        assert score.documents == len(part)
        assert score.value == pytest.approx(float(part.mean()))
        assert score.stderr == pytest.approx(float(part.std() / len(part) ** 0.5))


def test_composite_and_its_dense_export_score_alike(models: Models, tasks: Path) -> None:
    found = Tasks([CHOICE, ROLLING], tasks)
    ours, theirs = (found.run(open_any(path)) for path in (models.composite, models.export))
    assert [score.task for score in ours] == [CHOICE, ROLLING]
    assert ours[0] == theirs[0]
    assert ours[1].value == pytest.approx(theirs[1].value, rel=1e-5)
    assert ours[1].value > 0


def test_every_kind_of_model_can_be_asked(models: Models, tasks: Path, world: Any) -> None:
    found = Tasks([ROLLING], tasks)
    folders = (models.packed, models.vector, world.base, world.finetunes["letters"])
    values = [found.run(open_any(folder))[0].value for folder in folders]
    assert len(set(values)) == len(folders)
    assert min(values) == values[-1]


def test_nothing_is_printed_or_left_changed(
    models: Models,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import huggingface_hub
    from datasets import config

    monkeypatch.chdir(tmp_path)

    opened, environment = open_any(models.composite), dict(os.environ)
    flags = (huggingface_hub.constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE)
    capfd.readouterr()
    scores = run_tasks(opened, [CHOICE], TaskSettings(num_fewshot=1), include_path=tasks)
    assert scores[0].shots == 1
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert flags == (huggingface_hub.constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE)


def test_the_table_has_a_row_for_each_metric(models: Models, tasks: Path) -> None:
    scores = run_tasks(models.export, [CHOICE, ROLLING], include_path=tasks)
    rows = tasks_table(scores).rows
    assert [row[:2] for row in rows] == [(CHOICE, "acc"), (ROLLING, "bits_per_byte")]
    assert rows[0][4] == "8" and rows[1][3] == "\N{EN DASH}"


@pytest.fixture
def few_built_in(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own task files, of which there are thousands, are only these."""
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tasks / "manager.py"))


@pytest.mark.usefixtures("few_built_in")
def test_unknown_tasks_are_refused_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no 'next_wrod'; did you mean next_word\?"):
        Tasks(["next_wrod"])
    with pytest.raises(InputError, match=f"or in {tmp_path}, but there is no 'zzz'; `lm-eval ls"):
        Tasks([CHOICE, "zzz"], tmp_path)
    assert Tasks([CHOICE, CHOICE]).names == [CHOICE]


def test_wrong_settings_and_absent_data_are_refused(
    models: Models, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="limit must be at least 1, but it is 0"):
        TaskSettings(limit=0)
    with pytest.raises(InputError, match="folder of tasks at nowhere"):
        Tasks([CHOICE], "nowhere")
    with pytest.raises(InputError, match="at least one task"):
        Tasks([""])
    with pytest.raises(InputError, match=r"task elsewhere cannot be prepared: .*--online"):
        run_tasks(models.export, ["elsewhere"], include_path=tasks)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"not installed; .*pip install \"moiety\[eval\]\""):
        Tasks([CHOICE])


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["moiety", "eval", *map(str, arguments)])
        main()
    assert isinstance(stopped.value.code, int)
    out, log = capsys.readouterr()
    return stopped.value.code, out, log


def test_tasks_and_data_on_the_command_line(
    models: Models, tasks: Path, world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", CHOICE, "--include-path", tasks, "--limit", 3, "--json"]
    code, out, _ = run_cli(capsys, models.composite, *options)
    [row] = json.loads(out)["lm_eval"]
    assert code == 0 and row["documents"] == 3
    data = f"--data=anything={world.texts['letters']['heldout']}"
    size = ["--context-length", 32, "--windows", 4]
    code, out, _ = run_cli(capsys, models.packed, data, *size, *options)
    results = json.loads(out)
    assert code == 0 and results["loss"].keys() == {"model"} and len(results["lm_eval"]) == 1
    code, out, log = run_cli(capsys, models.packed)
    assert (code, out) == (2, "") and "--data NAME=FILE, --tasks A,B or both" in log


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
export, composite, tasks, name, out = sys.argv[1:]
ids = torch.arange(3, 43).reshape(2, 20)
with torch.no_grad():
    dense = AutoModelForCausalLM.from_pretrained(export)(input_ids=ids).logits
assert "moiety" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(composite, trust_remote_code=True)
assert type(model) is MixtralForCausalLM and type(model.config) is MixtralConfig
assert MixtralConfig._auto_class is None and MixtralForCausalLM._auto_class is None
with torch.no_grad():
    packed = model(input_ids=ids).logits
torch.save((dense, packed), f"{out}/logits.pt")
import lm_eval.tasks.manager as manager
import lm_eval.evaluator as evaluator
manager.__file__ = f"{tasks}/manager.py"
evaluator.add_env_info = lambda results: None
sys.argv = ["lm-eval", "run", "--model", "hf", "--tasks", name, "--device", "cpu",
    "--model_args", f"pretrained={composite},dtype=float32,trust_remote_code=True",
    "--output_path", f"{out}/results.json", "--batch_size", "8"]
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_stock_lm_eval_runs_it_where_nobody_imports_moiety(
    models: Models, tasks: Path, tmp_path: Path
) -> None:
    folders = [models.export, models.composite, tasks, CHOICE, tmp_path]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, folders)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    dense, packed = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(dense, packed, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(models.composite)
        assert torch.equal(packed, ours(input_ids=torch.arange(3, 43).reshape(2, 20)).logits)
    [written] = tmp_path.glob("results*.json")
    values = json.loads(written.read_text())["results"][CHOICE]
    [score] = run_tasks(models.composite, [CHOICE], include_path=tasks)
    assert (values["acc,none"], values["acc_stderr,none"]) == (score.value, score.stderr)
