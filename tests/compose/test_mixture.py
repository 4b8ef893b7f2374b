"""Every stock mixture holds the finetunes exactly: what each expert's model computes, it computes."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moiety.compose.composite import gate_weights
from moiety.compose.mixture import (
    Layout,
    accounting,
    layout_of,
    mixture_config,
    mixture_tensors,
    packed_mixture,
    write_mixture,
    zero_gates,
)
from moiety.compose.shared import replace_shared, use_of
from moiety.experts import Pattern, pack
from moiety.experts.architecture import Architecture
from moiety.experts.export import export_dense
from moiety.experts.modules import SparseExperts
from moiety.experts.quantizer import PackedConfig
from moiety.routers import find_gates, forced, one_hot

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
THETA = {"rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **THETA}
YARN = {"rope_type": "yarn", **THETA, "factor": 8.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}


@dataclass(frozen=True)
class Case:
    """A dense model, the layers that get experts, and the mixture it must become."""

    dense: str
    mixture: str
    layers: Any = "all"
    changes: Mapping[str, Any] | None = None


CASES = {
    "llama": Case("llama", "mixtral", changes={"tie_word_embeddings": True}),
    "llama scaled": Case("llama", "mixtral", changes={"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama some": Case("llama", "qwen2_moe", [2, 0], {"rope_parameters": YARN, "head_dim": 16}),
    "llama biased": Case("llama", "granitemoe", changes={"attention_bias": True, "head_dim": 16}),
    "mistral": Case("mistral", "mixtral", changes={"sliding_window": 5}),
    "mistral some": Case("mistral", "qwen2_moe", [1], {"sliding_window": None}),
    "qwen2": Case("qwen2", "qwen2_moe", changes={"rope_parameters": YARN}),
    "qwen2 some": Case("qwen2", "qwen2_moe", [0, 1], {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3": Case("qwen3", "qwen3_moe", changes={"head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen3 some": Case("qwen3", "qwen3_moe", [1, 2], {"head_dim": 8, "attention_bias": True}),
    "qwen3 window": Case("qwen3", "qwen3_moe", changes={"head_dim": 8, **WINDOW}),
    "olmo2": Case("olmo2", "flex_olmo", changes={"attention_bias": True, "rope_parameters": YARN}),
    "granite": Case("granite", "granitemoe", changes={"tie_word_embeddings": True, **GRANITE}),
}
IDS = torch.arange(3, 43).reshape(2, 20)
NAMES = ["a", "b", "c"]
FFN = re.compile(r"\.mlp\.(gate|up|down)_proj\.weight$")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def reopened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@dataclass(frozen=True)
class Inputs:
    """A base and three finetunes that differ from it in every tensor; tensors and the dense model.

    `write` makes a mixture of them on disk.
    """

    case: Case
    layout: Layout
    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    model: Any
    tokenizer: Any

    def dense(self, tensors: dict[str, Tensor]) -> Any:
        """The dense model with other weights."""
        model = copy.deepcopy(self.model)
        assert not model.load_state_dict(tensors, strict=False).unexpected_keys
        model.tie_weights()
        return model

    def gates(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        zeros = zero_gates(self.layout, 3, torch.float32)
        return {name: torch.randn(gate.shape, generator=generator) for name, gate in zeros.items()}

    def write(self, folder: Path, experts: Any, packed: Any = None, gates: Any = None) -> Path:
        folder.mkdir()
        config = mixture_config(self.layout, NAMES, 2, packed)
        tensors = mixture_tensors(self.layout, self.base, experts, gates or self.gates())
        write_mixture(folder, config, tensors, self.tokenizer, None)
        return folder

    def write_packed(self, folder: Path, pattern: str, values: str) -> Path:
        both = {
            n: packed_ffns(e, pattern, values) for n, e in zip(NAMES, self.experts, strict=True)
        }
        packed = packed_mixture(self.layout, {name: how for name, (_, how) in both.items()})
        return self.write(folder, [tensors for tensors, _ in both.values()], packed)


@torch.no_grad()
def perturb(model: Any, seed: int) -> None:
    """Move every parameter, those of norms and biases too, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter.dtype), alpha=0.1)


def make(case: Case, world: Any, dtype: torch.dtype = torch.float32) -> Inputs:
    layers = 2 if case.layers == "all" else 3
    sizes = {"vocab_size": 64, "num_hidden_layers": layers}
    fields = {**COMMON, **sizes, **(case.changes or {})}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.dense, **fields))
    model.to(dtype).eval()
    model.config.dtype = dtype
    stored = Architecture(model.config).shapes
    each: list[dict[str, Tensor]] = []
    for seed in range(4):
        perturb(model, seed)
        each.append({n: t.clone() for n, t in model.state_dict().items() if n in stored})
    layout = layout_of(model.config, case.layers)
    inputs = Inputs(case, layout, each[0], each[1:], model, world.tokenizer)
    model.load_state_dict(each[0], strict=False)
    return inputs


@pytest.fixture(scope="module", params=CASES)
def inputs(request: Any, world: Any) -> Inputs:
    return make(CASES[request.param], world)


@pytest.fixture(scope="module")
def mixture(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mixture") / "mixture"
    return reopened(inputs.write(folder, inputs.experts))


def packed_ffns(
    expert: Mapping[str, Tensor], pattern: str, values: str
) -> tuple[dict[str, Tensor], PackedConfig]:
    """A finetune with its FFNs pruned by magnitude and packed, and how."""
    rule, tensors = Pattern.parse(pattern), dict(expert)
    names = [name for name in expert if FFN.search(name)]
    for name in names:
        mask = rule.mask(tensors[name].abs(), within="matrix")
        tensors |= pack(tensors[name] * mask, rule, values, None, mask).tensors(name)
    modules = [name.removesuffix(".weight") for name in names]
    return tensors, PackedConfig(pattern=pattern, modules=modules, values=values)


def test_equal_experts_give_the_base(inputs: Inputs, tmp_path: Path) -> None:
    equal = [copy.deepcopy(inputs.base) for _ in NAMES]
    mixture = reopened(inputs.write(tmp_path / "mixture", equal))
    assert mixture.config.model_type == inputs.case.mixture
    close(logits(mixture), logits(inputs.model))
    wanted = range(2) if inputs.case.layers == "all" else sorted(inputs.case.layers)
    gates = [gate.name for gate in find_gates(mixture)]
    assert gates == [inputs.layout.gate(layer).removesuffix(".weight") for layer in wanted]


def test_one_hot_routes_are_the_finetunes(inputs: Inputs, mixture: Any) -> None:
    mixture = copy.deepcopy(mixture)
    for number, finetune in enumerate(inputs.experts):
        replace_shared(mixture, {name: finetune[name] for name in inputs.layout.shared_names})
        alone = logits(inputs.dense(finetune))
        with forced(find_gates(mixture), one_hot(number)):
            close(logits(mixture), alone)
        with forced(find_gates(mixture), one_hot((number + 1) % 3)):
            assert (logits(mixture) - alone).abs().max() > 1e-2


def test_the_order_of_experts_does_not_matter(inputs: Inputs, mixture: Any, tmp_path: Path) -> None:
    order = [2, 0, 1]
    gates = {name: gate_ED[order] for name, gate_ED in inputs.gates().items()}
    experts = [inputs.experts[number] for number in order]
    moved = reopened(inputs.write(tmp_path / "moved", experts, gates=gates))
    close(logits(mixture), logits(moved))
    replace_shared(moved, inputs.gates())
    assert (logits(mixture) - logits(moved)).abs().max() > 1e-3


def test_packed_experts_open_save_generate_and_export(inputs: Inputs, tmp_path: Path) -> None:
    flat = inputs.case.layers != "all" or inputs.case.dense == "granite"
    form = ("0.5", "fp32") if flat else ("2:4", "bf16")
    folder = inputs.write_packed(tmp_path / "packed", *form)
    mixture = reopened(folder)
    modules = [name for name, m in mixture.named_modules() if isinstance(m, SparseExperts)]
    assert modules == [inputs.layout.experts_module(layer) for layer in inputs.layout.layers]
    gates = gate_weights(mixture)
    assert gates.keys() == inputs.gates().keys()
    assert all(torch.equal(gates[name], gate) for name, gate in inputs.gates().items())

    mixture.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(mixture), logits(reopened(tmp_path / "again")))
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    export_dense(folder, tmp_path / "dense")
    dense = reopened(tmp_path / "dense")
    close(logits(mixture), logits(dense))
    assert not hasattr(dense.config, "quantization_config")
    assert all(type(m).__module__.startswith(("torch", "transformers")) for m in dense.modules())
    stored = load_file(tmp_path / "dense" / "model.safetensors").keys()
    dense.save_pretrained(tmp_path / "canonical")
    assert stored == load_file(tmp_path / "canonical" / "model.safetensors").keys()
    how = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(mixture.generate(IDS, **how), dense.generate(IDS, **how))


def test_every_tensor_of_every_input_is_accounted_for(inputs: Inputs) -> None:
    experts = dict(zip(NAMES, inputs.experts, strict=True))
    shared_of = partial(use_of, "base", names=NAMES)
    report = json.loads(json.dumps(accounting(inputs.layout, inputs.base, experts, shared_of)))
    shared = unfolded(report["shared"])
    blocks = tuple(f"model.layers.{layer}.mlp." for layer in inputs.layout.layers)
    ours = {name for name in inputs.base if name.startswith(blocks)}
    assert shared == set(inputs.base) - ours and len(ours) == 3 * len(blocks)
    assert {key: unfolded(names) for key, names in report["base"].items()} == {
        "used": shared,
        "superseded": ours,
        "unknown": set(),
    }
    for name in NAMES:
        parts = {key: unfolded(names) for key, names in report["experts"][name].items()}
        assert parts == {"used": ours, "superseded": shared, "unknown": set()}
    made = mixture_tensors(inputs.layout, inputs.base, inputs.experts, inputs.gates())
    others = [tensor for name, tensor in made if name not in shared | unfolded(report["added"])]
    assert sum(tensor.numel() for tensor in others) == len(blocks) * 3 * 3 * 32 * 48


def unfolded(names: list[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        before, numbers, after = re.fullmatch(r"([^{]*)(?:\{(.*)\}(.*))?", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if numbers is None:
            found.add(before)
            continue
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            found |= {f"{before}{number}{after}" for number in span}
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2 some", "qwen3", "olmo2", "granite"])
def test_bf16_checkpoints_stay_bf16(world: Any, tmp_path: Path, name: str) -> None:
    inputs = make(CASES[name], world, torch.bfloat16)
    gates = zero_gates(inputs.layout, 3, torch.bfloat16)
    equal = [copy.deepcopy(inputs.base) for _ in NAMES]
    folder = inputs.write(tmp_path / "mixture", equal, gates=gates)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    mixture = reopened(folder)
    assert mixture.dtype == torch.bfloat16 == mixture.config.dtype
    difference = (logits(mixture) - logits(inputs.model)).abs().max()
    assert difference < 0.02 * logits(mixture).abs().max()


def test_neutral_parts_add_exactly_nothing(world: Any, tmp_path: Path) -> None:
    inputs = make(CASES["qwen2"], world)
    mixture = reopened(inputs.write(tmp_path / "mixture", inputs.experts))
    blocks = [layer.mlp for layer in mixture.model.layers]
    assert {block.shared_expert.gate_proj.weight.shape for block in blocks} == {(1, 32)}
    mixture(input_ids=IDS, labels=IDS).loss.backward()
    for block in blocks:
        parts = [*block.shared_expert.parameters(), *block.shared_expert_gate.parameters()]
        assert len(parts) == 4 and all(not part.grad.any() for part in parts)
    before = logits(mixture)
    for block in blocks:
        block.shared_expert.forward = torch.zeros_like
    assert torch.equal(before, logits(mixture))
