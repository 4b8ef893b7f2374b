"""What only a real GPU can show: the public ops there, compiled, captured, and in whole models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moiety.experts import kernels
from moiety.experts.export import export_dense
from moiety.experts.kernels import Weights
from moiety.experts.kernels.cuda.semi_structured import compressed
from moiety.experts.modules import PackedModule, favour_prefill

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]
KINDS = ("bf16", "int8", "int4")


def block(packs: Any, gpu: Any, kind: str) -> tuple[Weights, Weights]:
    return gpu.stack(packs, 4, 2 * 96, 320, kind)[1], gpu.stack(packs, 4, 320, 96, kind)[1]


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    shares, chosen = torch.rand(tokens, 4, device="cuda").softmax(-1).topk(2)
    return chosen, shares


@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 17, 64, 65, 300, 1025, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_tokens(packs: Any, gpu: Any, kind: str, tokens: int) -> None:
    dense, weights = gpu.stack(packs, 1, 200, 332, kind)
    input = torch.randn(tokens, 332, device="cuda").bfloat16()
    output = kernels.sparse_linear(input, weights)
    expected = input.double() @ dense[0].T
    assert float((output.double() - expected).norm() / expected.norm()) < 6e-3
    gate_up, down = block(packs, gpu, kind)
    hidden = torch.randn(tokens, 320, device="cuda").bfloat16()
    chosen, shares = routing(tokens)
    output = kernels.sparse_experts(hidden, gate_up, down, chosen, shares)
    stored = kernels.untiled(gate_up), kernels.untiled(down)
    expected = kernels.sparse_experts(hidden.float(), *stored, chosen, shares)
    assert float((output.float() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_input_and_routing(packs: Any, gpu: Any, kind: str) -> None:
    gate_up, down = block(packs, gpu, kind)
    chosen, shares = routing(9)
    stored = kernels.untiled(gate_up), kernels.untiled(down)
    found = []
    for stacks, dtype in ((gate_up, down), torch.bfloat16), (stored, torch.float32):
        torch.manual_seed(0)
        hidden = torch.randn(9, 320, device="cuda").to(dtype).requires_grad_()
        weights = shares.clone().requires_grad_()
        output = kernels.sparse_experts(hidden, *stacks, chosen, weights)
        found.append(torch.autograd.grad(output.float().square().sum(), (hidden, weights)))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 3e-2


def test_ops_pass_opcheck_and_compile_whole(packs: Any, gpu: Any) -> None:
    gate_up, down = block(packs, gpu, "int8")
    hidden = torch.randn(5, 320, device="cuda").bfloat16()
    chosen, shares = routing(5)
    arguments = (hidden, *gate_up, *down, chosen, shares, "silu")
    torch.library.opcheck(torch.ops.moiety.sparse_experts.default, arguments)
    compiled: Any = torch.compile(kernels.sparse_experts, fullgraph=True, backend="aot_eager")
    output = compiled(hidden, gate_up, down, chosen, shares)
    assert torch.equal(output, kernels.sparse_experts(hidden, gate_up, down, chosen, shares))


@pytest.mark.parametrize("tokens", [33, 1200])
def test_a_captured_block_replays_with_other_tokens_and_routes(
    packs: Any, gpu: Any, tokens: int
) -> None:
    gate_up, down = block(packs, gpu, "bf16")
    hidden = torch.randn(tokens, 320, device="cuda").bfloat16()
    chosen, shares = routing(tokens)
    kernels.sparse_experts(hidden, gate_up, down, chosen, shares)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernels.sparse_experts(hidden, gate_up, down, chosen, shares)
    for _ in range(3):
        hidden.normal_()
        other, other_shares = routing(tokens)
        chosen.copy_(other)
        shares.copy_(other_shares)
        graph.replay()
        torch.cuda.synchronize()
        again = kernels.sparse_experts(hidden, gate_up, down, chosen, shares)
        assert torch.equal(output, again)


def test_results_are_the_same_every_time(packs: Any, gpu: Any) -> None:
    _, weights = gpu.stack(packs, 1, 96, 4096, "bf16")
    input = torch.randn(3, 4096, device="cuda").bfloat16()
    first = kernels.sparse_linear(input, weights)
    assert all(torch.equal(first, kernels.sparse_linear(input, weights)) for _ in range(20))


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_mixture_generates_as_its_dense_export(
    packs: Any, tmp_path: Path, kind: str
) -> None:
    folder = packs.write_packed(packs.tiny_mixtral(), tmp_path, packs.EXPERTS, "2:4", kind)
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    sparse = opened.cuda()
    modules = [module for module in sparse.modules() if isinstance(module, PackedModule)]
    assert all(module.weights(name).is_planes for module in modules for name in module.widths)
    exported = tmp_path / "exported"
    export_dense(folder, exported)
    dense: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    ids = torch.arange(3, 19, device="cuda").reshape(2, 8)
    with torch.inference_mode():
        ours, theirs = sparse(ids).logits.float(), dense.cuda()(ids).logits.float()
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2
    tokens = sparse.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_there_and_back_changes_no_bit(packs: Any, tmp_path: Path, kind: str) -> None:
    folder = packs.write_packed(packs.tiny_mixtral(), tmp_path, packs.EXPERTS, "2:4", kind)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.cuda()
    there = model.state_dict()
    assert all(torch.equal(there[name].cpu(), tensor) for name, tensor in before.items())
    back = model.cpu().state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    direct: Any = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
    modules = [module for module in direct.modules() if isinstance(module, PackedModule)]
    assert modules and all(m.weights(name).is_planes for m in modules for name in m.widths)


@pytest.mark.skipif(
    not torch.backends.cusparselt.is_available(), reason="torch has no cuSPARSELt here"
)
def test_metadata_for_prompts_changes_no_value(packs: Any, tmp_path: Path) -> None:
    folder = packs.write_packed(
        packs.tiny_mixtral(hidden_size=128, intermediate_size=256),
        tmp_path,
        packs.EXPERTS,
        "2:4",
        "bf16",
    )
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = opened.cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(64, (4, 200), device="cuda")
    with torch.inference_mode():
        expected = model(ids).logits.float()
    small = sum(m.packed_bytes for m in model.modules() if isinstance(m, PackedModule))
    favour_prefill(model)
    modules = [m for m in model.modules() if isinstance(m, PackedModule)]
    assert all(compressed(m.weights(name), 0) is not None for m in modules for name in m.widths)
    values = sum(m.weights(name).values.nbytes for m in modules for name in m.widths)
    assert sum(m.packed_bytes for m in modules) == small + values // 8
    with torch.inference_mode():
        error = (model(ids).logits.float() - expected).norm() / expected.norm()
    assert float(error) < 2e-2
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_refusals_are_those_of_the_cpu(packs: Any, gpu: Any) -> None:
    gate_up, down = block(packs, gpu, "bf16")
    chosen, shares = routing(3)
    with pytest.raises(ValueError, match="hidden must be"):
        kernels.sparse_experts(torch.randn(3, 321, device="cuda"), gate_up, down, chosen, shares)
    with pytest.raises(ValueError, match="same layout"):
        hidden = torch.randn(3, 320, device="cuda")
        kernels.sparse_experts(hidden, gate_up, kernels.untiled(down), chosen, shares)
