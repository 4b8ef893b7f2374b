"""LoRA and masks: what is trained is what is merged, and merging others' adapters is told."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moiety.errors import InputError
from moiety.experts.kernels.reference import unpack_bits
from moiety.experts.recovery.adapters import merge_lora
from moiety.experts.recovery.lora import adapted, masked_layer
from moiety.experts.recovery.masked_lora import MaskedLoraLinear, quiet_peft
from moiety.experts.recovery.student import open_student
from moiety.experts.unpack import dense_view

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
    """A finetune whose FFN is packed."""
    out = tmp_path_factory.mktemp("sparse") / "model"
    return toys.pack_model(world.finetunes[DENSE], out, part=".mlp.")


def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits


def shake(network: torch.nn.Module) -> None:
    """Give the second factors of a LoRA, which start at 0, random values."""
    generator = torch.Generator().manual_seed(7)
    for name, one in network.named_parameters():
        if "lora_B" in name:
            one.data.copy_(0.1 * torch.randn(one.shape, generator=generator))


def test_the_merged_model_is_the_trained_one(
    toys: ModuleType, sparse: Path, tmp_path: Path
) -> None:
    student = open_student(sparse)
    before = logits(student.network)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    network = adapted(student, toys.LORA)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(network), before)
    shake(network)
    trained = logits(network)
    assert not torch.allclose(trained, before, atol=1e-2)
    with torch.no_grad():
        values = {
            module: masked_layer(network, module).merged_weight()[matrix.mask_OI]
            for module, matrix in student.matrices.items()
        }
    (tmp_path / "out").mkdir()
    student.write(tmp_path / "out", values)
    torch.testing.assert_close(logits(toys.opened(tmp_path / "out")), trained, atol=1e-5, rtol=0)
    old, new = toys.state(sparse), toys.state(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith("_mask"))


def test_a_plain_lora_would_compute_something_else(toys: ModuleType, sparse: Path) -> None:
    network = adapted(open_student(sparse), toys.LORA)
    shake(network)
    masked = logits(network)
    for module in network.modules():
        if isinstance(module, MaskedLoraLinear):
            module.mask_OI.fill_(True)
    assert not torch.allclose(logits(network), masked, atol=1e-2)


def adapter(dense: Path, out: Path, **options: Any) -> Path:
    """A PEFT adapter of the dense finetune with a random update; gives `out`."""
    settings: dict[str, Any] = {"r": 4, "target_modules": ["up_proj", "q_proj"], **options}
    with quiet_peft():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), LoraConfig(**settings))
        assert isinstance(model, PeftModel)
        shake(model)
        model.save_pretrained(str(out))
    return out


def test_an_adapter_is_merged_within_the_masks(world: Any, sparse: Path, tmp_path: Path) -> None:
    folder = adapter(world.finetunes[DENSE], tmp_path / "adapter", lora_alpha=6, use_rslora=True)
    report = merge_lora(sparse, folder, tmp_path / "out")
    before, after = dense_view(sparse), dense_view(tmp_path / "out")
    factors = load_file(folder / "adapter_model.safetensors")
    lost, total = 0.0, 0.0
    for name in before:
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" not in factors:
            assert torch.equal(after[name], before[name])
            continue
        update = 3.0 * factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"]
        expected = before[name].float() + update
        if name in before.packed:
            mask = unpack_bits(before.raw[f"{name}_mask"], update.shape[1]).bool()
            expected = expected.masked_fill(~mask, 0)
            dropped = float(update[~mask].norm())
            module = name.removesuffix(".weight")
            assert report.matrices[module] == pytest.approx(dropped / float(update.norm()))
            lost, total = lost + dropped**2, total + float(update.norm()) ** 2
        torch.testing.assert_close(after[name], expected.to(after[name].dtype))
    assert report.dropped == pytest.approx((lost / total) ** 0.5)
    assert 0.5 < report.dropped < 0.9
    assert report.whole == tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    written = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert (written["method"], written["dropped"]) == ("merge_lora", report.dropped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens it is of type Embedding"),
        ({"target_modules": ["lm_head"]}, "lm_head its weight is tied"),
        ({"use_rslora": True, "init_lora_weights": "pissa"}, "pissa initialisation"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_merged_is_refused(
    world: Any, sparse: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = adapter(world.finetunes[DENSE], tmp_path / "adapter", **options)
    with pytest.raises(InputError, match=message):
        merge_lora(sparse, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_of_this_model_is_refused(
    world: Any, sparse: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        merge_lora(sparse, world.finetunes[DENSE], out)
    folder = adapter(world.finetunes[DENSE], tmp_path / "adapter")
    with pytest.raises(InputError, match="is dense; prune it first"):
        merge_lora(world.finetunes[DENSE], folder, out)
    weights = load_file(folder / "adapter_model.safetensors")
    for change, message in (("shape", "size mismatch"), ("missing", "missing adapter keys")):
        other = tmp_path / change
        shutil.copytree(folder, other)
        damaged = dict(weights)
        name = next(iter(damaged))
        tensor = damaged.pop(name)
        if change == "shape":
            damaged[name] = tensor[:, :-1].contiguous()
        save_file(damaged, other / "adapter_model.safetensors")
        with pytest.raises(InputError, match=f"adapter of this model.*{message}"):
            merge_lora(sparse, other, out)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["nothing_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="adapter of this model"):
        merge_lora(sparse, folder, out)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="only safetensors adapters are read"):
        merge_lora(sparse, folder, out)
