"""Recovery of whole packed models: masks stay, losses fall, stops and wrong inputs do no harm."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from moiety.errors import InputError, OutputError
from moiety.experts.recovery import DistillSettings, LoraSettings, RecoveryReport, recover
from moiety.experts.shards import write_weights
from moiety.scoring import score
from moiety.text import read_documents, token_windows

WORKER = Path(__file__).with_name("recovery_worker.py")
DENSE = "letters"


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    """The module `recovery_toys.py`."""
    path = Path(__file__).with_name("recovery_toys.py")
    spec = importlib.util.spec_from_file_location("recovery_toys", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sparse(world: Any, toys: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed finetune."""
    return toys.pack_model(world.finetunes[DENSE], tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture(scope="module")
def recovered(
    world: Any, toys: ModuleType, sparse: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, RecoveryReport]]:
    """The packed finetune after recovery by each method."""
    folder, done = tmp_path_factory.mktemp("recovered"), {}
    settings = {
        "kept": ("distill", toys.DISTILL),
        "all": ("distill", dataclasses.replace(toys.DISTILL, train="all", micro_batch=1)),
        "lora": ("lora", toys.LORA),
    }
    for name, (method, one) in settings.items():
        text = world.texts[DENSE]["calibration"]
        report = recover(sparse, world.finetunes[DENSE], text, folder / name, method, one)
        done[name] = folder / name, report
    return done


def held_windows(world: Any, model: Path) -> Any:
    documents = read_documents(world.texts[DENSE]["calibration"])
    windows = token_windows(AutoTokenizer.from_pretrained(model), documents, 32, 40)
    return windows.hold_back(4)[1]


@pytest.mark.parametrize("way", ["kept", "all", "lora"])
def test_loss_falls_and_only_what_may_change_does(
    toys: ModuleType, sparse: Path, recovered: Any, way: str
) -> None:
    out, report = recovered[way]
    assert report.loss_after < report.loss_before
    before, after = toys.state(sparse), toys.state(out)
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        packed = f"{name}_mask" in before
        if name.endswith("_mask") or not (packed or way == "all"):
            assert torch.equal(new, old), name
        else:
            assert not torch.equal(new, old), name


@pytest.mark.parametrize("way", ["kept", "all", "lora"])
def test_what_is_written_is_what_was_measured(
    world: Any, toys: ModuleType, sparse: Path, recovered: Any, way: str
) -> None:
    out, report = recovered[way]
    windows = held_windows(world, sparse)
    for folder, loss in ((sparse, report.loss_before), (out, report.loss_after)):
        assert score(toys.opened(folder), windows).loss == pytest.approx(loss, abs=2e-6)
    teacher = LlamaForCausalLM.from_pretrained(world.finetunes[DENSE])
    assert score(teacher, windows).loss == pytest.approx(report.loss_teacher, abs=1e-6)
    assert report.held_tokens == int(windows.mask_WC[:, 1:].sum())


def test_the_report_lies_beside_a_complete_model(sparse: Path, recovered: Any) -> None:
    out, report = recovered["kept"]
    written = json.loads((out / "recovery.json").read_text())
    assert written["loss_after"] == report.loss_after
    assert (written["method"], written["context_length"]) == ("distill", 32)
    assert [row["step"] for row in written["history"]] == [0, 4, 8, 12]
    same = {path.name for path in sparse.iterdir()} | {"recovery.json"}
    assert {path.name for path in out.iterdir()} == same
    assert (out / "config.json").read_text() == (sparse / "config.json").read_text()


def test_lora_trains_fewer_parameters(recovered: Any) -> None:
    kept, lora = (recovered[way][1].parameters for way in ("kept", "lora"))
    assert kept == sum(2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) // 2 for _ in range(1))
    assert lora < kept


@pytest.mark.parametrize("pattern", ["0.5", "1:4"])
def test_other_patterns_and_dtypes_stay_as_they_are(
    world: Any, toys: ModuleType, tmp_path: Path, pattern: str
) -> None:
    dense, text = world.finetunes[DENSE], world.texts[DENSE]["calibration"]
    sparse = toys.pack_model(dense, tmp_path / "sparse", pattern, "fp32")
    report = recover(sparse, dense, text, tmp_path / "out", settings=toys.DISTILL)
    assert report.loss_after < report.loss_before
    before, after = toys.state(sparse), toys.state(tmp_path / "out")
    for name in before:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]) == (f"{name}_mask" not in before)
    toys.opened(tmp_path / "out")


def test_each_loss_alone_trains_and_none_makes_it_worse(
    world: Any, toys: ModuleType, sparse: Path, tmp_path: Path
) -> None:
    names = ("cross_entropy", "kl", "square_head")
    text = world.texts[DENSE]["calibration"]
    for name in names:
        weights = {other: float(other == name) for other in names}
        settings = dataclasses.replace(toys.DISTILL, **weights, activation_checkpointing=True)
        report = recover(sparse, world.finetunes[DENSE], text, tmp_path / name, settings=settings)
        assert report.loss_after < report.loss_before
    wild = dataclasses.replace(toys.DISTILL, rate=50.0, max_gradient=1e6)
    report = recover(sparse, world.finetunes[DENSE], text, tmp_path / "wild", settings=wild)
    assert (report.best_step, report.loss_after) == (0, report.loss_before)
    before, after = toys.state(sparse), toys.state(tmp_path / "wild")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_activation_checkpoints_and_micro_batches_change_nothing(
    world: Any, toys: ModuleType, sparse: Path, recovered: Any, tmp_path: Path
) -> None:
    settings = dataclasses.replace(toys.DISTILL, activation_checkpointing=True, micro_batch=3)
    text = world.texts[DENSE]["calibration"]
    report = recover(sparse, world.finetunes[DENSE], text, tmp_path / "out", settings=settings)
    losses = [evaluation.loss for evaluation in recovered["kept"][1].history]
    assert [one.loss for one in report.history] == pytest.approx(losses, abs=1e-4)


def arguments(world: Any, sparse: Path, out: Path, checkpoint: Path) -> list[str]:
    text = world.texts[DENSE]["calibration"]
    return [str(path) for path in (sparse, world.finetunes[DENSE], text, out, checkpoint)]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | more


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    world: Any, sparse: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    python = [sys.executable, str(WORKER)]
    first = arguments(world, sparse, whole, tmp_path / "whole.steps")
    second = arguments(world, sparse, broken, tmp_path / "broken.steps")
    subprocess.run([*python, *first], env=environment(), check=True, timeout=240)
    killed = subprocess.run([*python, *second, "2"], env=environment(), timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not broken.exists()
    assert json.loads((tmp_path / "broken.steps/state.json").read_text())["step"] == 4
    subprocess.run([*python, *second], env=environment(), check=True, timeout=240)
    files = {path.name for path in whole.iterdir()}
    assert files == {path.name for path in broken.iterdir()}
    for name in files - {"recovery.json"}:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    reports = [json.loads((one / "recovery.json").read_text()) for one in (whole, broken)]
    assert reports[0]["history"] == reports[1]["history"]


def test_two_processes_give_the_result_of_one(
    world: Any, toys: ModuleType, sparse: Path, recovered: Any, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = arguments(world, sparse, tmp_path / "out", tmp_path / "steps")
    done = subprocess.run(
        [*launch, str(WORKER), *given],
        env=environment(),
        check=True,
        timeout=240,
        capture_output=True,
        text=True,
    )
    losses = json.loads(done.stdout.splitlines()[-1])
    alone = [evaluation.loss for evaluation in recovered["kept"][1].history]
    assert losses == pytest.approx(alone, abs=1e-4)
    before, after = toys.state(sparse), toys.state(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before if "_mask" in name)


def test_a_checkpoint_of_another_run_is_refused(
    world: Any, toys: ModuleType, sparse: Path, tmp_path: Path
) -> None:
    text, dense = world.texts[DENSE]["calibration"], world.finetunes[DENSE]
    settings = dataclasses.replace(toys.DISTILL, steps=1, checkpoint=tmp_path / "steps")
    recover(sparse, dense, text, tmp_path / "one", settings=settings)
    other = dataclasses.replace(settings, rate=0.03)
    with pytest.raises(InputError, match="of another run"):
        recover(sparse, dense, text, tmp_path / "two", settings=other)
    [file] = (tmp_path / "steps").glob("step-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="it has changed"):
        recover(sparse, dense, text, tmp_path / "two", settings=settings)
    assert not (tmp_path / "two").exists()


def test_wrong_models_are_refused_before_any_work(
    world: Any, toys: ModuleType, sparse: Path, tmp_path: Path
) -> None:
    dense, text, out = world.finetunes[DENSE], world.texts[DENSE]["calibration"], tmp_path / "out"
    with pytest.raises(InputError, match="is dense; prune it first"):
        recover(dense, dense, text, out, settings=toys.DISTILL)
    with pytest.raises(InputError, match=r"dense finetune as teacher, but .* is packed"):
        recover(sparse, sparse, text, out, settings=toys.DISTILL)
    larger = tmp_path / "larger"
    config = LlamaForCausalLM.from_pretrained(dense).config
    config.num_hidden_layers = 3
    LlamaForCausalLM(config).save_pretrained(larger)
    with pytest.raises(InputError, match=r"num_hidden_layers 2, .* but it is 3"):
        recover(sparse, larger, text, out, settings=toys.DISTILL)
    with pytest.raises(InputError, match="model folder or a hub id"):
        recover(sparse, tmp_path / "nothing", text, out, settings=toys.DISTILL)
    assert not out.exists()


def test_integer_values_are_refused(
    world: Any, toys: ModuleType, sparse: Path, tmp_path: Path
) -> None:
    integer = tmp_path / "integer"
    _quantised(toys, sparse, integer)
    with pytest.raises(InputError, match=r"floating-point values .* they are int8.* bf16"):
        recover(integer, world.finetunes[DENSE], ["text"], tmp_path / "out", settings=toys.DISTILL)


def _quantised(toys: ModuleType, sparse: Path, out: Path) -> None:
    """A packed model whose int8 codes are all 1: enough to be opened."""
    shutil.copytree(sparse, out)
    tensors = toys.state(sparse)
    for name in [name for name in tensors if f"{name}_mask" in tensors]:
        tensors[name] = torch.ones_like(tensors[name], dtype=torch.int8)
        rows, bytes_a_row = tensors[f"{name}_mask"].shape
        groups = -(-bytes_a_row * 8 // 128)
        tensors[f"{name}_scale"] = torch.ones(rows, groups, dtype=torch.bfloat16)
    write_weights(out, sorted(tensors.items()))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["values"] = "int8"
    (out / "config.json").write_text(json.dumps(config))


def test_wrong_text_and_folders_are_refused(
    world: Any, toys: ModuleType, sparse: Path, tmp_path: Path
) -> None:
    dense, text = world.finetunes[DENSE], world.texts[DENSE]["calibration"]
    out = tmp_path / "out"
    with pytest.raises(InputError, match="there is none"):
        recover(sparse, dense, tmp_path / "no.jsonl", out, settings=toys.DISTILL)
    with pytest.raises(InputError, match="every 4-th can be held back, but there are 2"):
        documents = read_documents(text)[:1]
        two = dataclasses.replace(toys.DISTILL, windows=2)
        recover(sparse, dense, documents * 2, out, settings=two)
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(OutputError, match="holds files"):
        recover(sparse, dense, text, out, settings=toys.DISTILL)


def test_one_process_has_one_precision(
    world: Any, toys: ModuleType, sparse: Path, recovered: Any, tmp_path: Path
) -> None:
    assert recovered
    settings = dataclasses.replace(toys.DISTILL, mixed_precision="bf16")
    text = world.texts[DENSE]["calibration"]
    with pytest.raises(InputError, match="mixed_precision must be no, in which"):
        recover(sparse, world.finetunes[DENSE], text, tmp_path / "out", settings=settings)


def test_method_and_settings_belong_together(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="method must be one of distill, lora"):
        recover(sparse, sparse, ["x"], tmp_path / "out", "magic")
    with pytest.raises(InputError, match="must be LoraSettings"):
        recover(sparse, sparse, ["x"], tmp_path / "out", "lora", DistillSettings())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DistillSettings, "train", "some"),
        (DistillSettings, "steps", 0),
        (DistillSettings, "kl", -1.0),
        (DistillSettings, "temperature", 0.0),
        (DistillSettings, "held_every", 1),
        (DistillSettings, "mixed_precision", "fp8"),
        (LoraSettings, "rank", 0),
        (LoraSettings, "alpha", 0.0),
        (LoraSettings, "rate", float("nan")),
    ],
)
def test_settings_name_the_field(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        kind(**{field: value})


def test_some_loss_is_needed() -> None:
    with pytest.raises(InputError, match="cross_entropy, kl, square_head must be positive"):
        DistillSettings(cross_entropy=0, kl=0, square_head=0)
