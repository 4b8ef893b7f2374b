"""Old sparse checkpoints become packed ones, exactly, or are refused with the reason."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moiety.errors import InputError, OutputError
from moiety.experts.export import export_dense
from moiety.experts.kernels import reference
from moiety.experts.modules import SparseExperts, SparseLinear
from moiety.experts.rescue import rescue
from moiety.experts.unpack import dense_view

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.arange(3, 23).reshape(2, 10)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits


@pytest.mark.parametrize(("name", "zeros"), [("sparse24", 0), ("sparse", 95)])
def test_a_genuine_checkpoint_is_rescued_exactly(tmp_path: Path, name: str, zeros: int) -> None:
    report = rescue(GOLDEN / name, tmp_path / "out")
    assert (report.matrices, report.added_zeros) == (7, zeros)
    view = dense_view(tmp_path / "out")
    assert {n: digest(view[n]) for n in view} == json.loads(
        (GOLDEN / name / "digests.json").read_text()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 7
    assert model.dtype == torch.bfloat16
    export_dense(tmp_path / "out", tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "dense"))


def test_two_four_bytes_are_kept_as_they_are(tmp_path: Path) -> None:
    rescue(GOLDEN / "sparse24", tmp_path / "out")
    old = load_file(GOLDEN / "sparse24" / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    for name in (n for n in old if n.endswith(".compressed")):
        stem = name.removesuffix(".compressed")
        assert torch.equal(old[name], new[f"{stem}.weight"])
        assert torch.equal(old[f"{stem}.bitmask"], new[f"{stem}.weight_mask"])


def test_unstructured_matrices_get_the_lowest_density_that_holds_them(tmp_path: Path) -> None:
    rescue(GOLDEN / "sparse", tmp_path / "out")
    old = load_file(GOLDEN / "sparse" / "model.safetensors")
    view = dense_view(tmp_path / "out")
    for name, pattern in view.packed.items():
        rows, columns = view[name].shape
        kept = len(old[f"{name.removesuffix('.weight')}.compressed"])
        assert 0 <= rows * pattern.kept_columns(columns) - kept < rows


def compress(weight: Tensor, stem: str, form: str) -> dict[str, Tensor]:
    """The parts that the old library stores of a dense matrix."""
    kept = weight != 0
    if form == "sparse-24-bitmask":
        groups = weight.abs().reshape(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept = kept.scatter_(1, groups.topk(2).indices, True).view_as(weight)
    counts = kept.sum(-1)
    parts = {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[kept],
        "bitmask": reference.pack_bits(kept),
        "row_offsets": counts.cumsum(0) - counts,
    }
    if form == "sparse-24-bitmask":
        del parts["row_offsets"]
        parts["shape"] = parts["shape"].reshape(-1, 1)
        parts["compressed"] = parts["compressed"].reshape(weight.shape[0], -1)
    return {f"{stem}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("name", ["sparse24", "sparse"])
def test_the_writer_of_these_tests_writes_what_the_library_wrote(name: str) -> None:
    old = load_file(GOLDEN / name / "model.safetensors")
    form = "sparse-24-bitmask" if name == "sparse24" else "sparse-bitmask"
    for stem in (n.removesuffix(".compressed") for n in old if n.endswith(".compressed")):
        shape = tuple(old[f"{stem}.shape"].flatten().tolist())
        dense = reference.expand(old[f"{stem}.compressed"], old[f"{stem}.bitmask"], shape[1])
        ours = compress(dense, stem, form)
        assert ours.keys() == {n for n in old if n.startswith(f"{stem}.")}
        if stem != "model.layers.0.mlp.up_proj":
            assert all(torch.equal(old[n], tensor) for n, tensor in ours.items())


def write_old(
    model: Any, folder: Path, form: str, wanted: Callable[[str], bool], whole_names: bool = False
) -> Path:
    """Write a model in an old format, the weights whose names are `wanted` compressed."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if wanted(n)]:
        weight = tensors.pop(name)
        if form == "sparse-24-bitmask":
            groups = weight.abs().reshape(-1, 4)
            weight = weight * (groups >= groups.topk(2).values[:, 1:]).view_as(weight)
        elif weight.ndim > 1:
            weight = weight * (weight.abs() > weight.abs().median())
        stem = name if whole_names else name.removesuffix(".weight")
        tensors |= compress(weight, stem, form)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = {"sparsity_config": {"format": form}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
def test_a_mixture_of_linear_experts_becomes_packed_experts(
    packs: Any, tmp_path: Path, form: str
) -> None:
    folder = write_old(packs.tiny_mixtral(), tmp_path / "old", form, lambda n: ".experts." in n)
    report = rescue(folder, tmp_path / "out")
    assert report.matrices == 18
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, SparseExperts) for module in model.modules()) == 2
    export_dense(tmp_path / "out", tmp_path / "dense")
    torch.testing.assert_close(
        logits(tmp_path / "out"), logits(tmp_path / "dense"), rtol=1e-4, atol=1e-5
    )


def test_the_first_versions_compressed_vectors_and_embeddings_too(
    packs: Any, tmp_path: Path
) -> None:
    """Up to compressed-tensors 0.6: whole names, every tensor."""
    model = packs.tiny_mixtral(num_local_experts=2)
    folder = write_old(model, tmp_path / "old", "sparse-bitmask", lambda _: True, whole_names=True)
    rescue(folder, tmp_path / "out")
    view = dense_view(tmp_path / "out")
    assert torch.equal(view["model.norm.weight"], model.model.norm.weight)
    assert "model.embed_tokens.weight" not in view.packed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


UP = "model.layers.0.mlp.up_proj"


def damage(folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"]
    match change:
        case "bit":
            tensors[f"{UP}.bitmask"][0, 0] ^= 1
        case "offsets":
            tensors[f"{UP}.row_offsets"][2] += 1
        case "nan":
            tensors[f"{UP}.compressed"].view(-1)[0] = float("nan")
        case "shape":
            tensors[f"{UP}.shape"][0] = 47
        case "fp8":
            tensors[f"{UP}.compressed"] = tensors[f"{UP}.compressed"].to(torch.float8_e4m3fn)
        case "no bitmask":
            del tensors[f"{UP}.bitmask"]
        case "no module":
            tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{UP}.")}
        case "no norm":
            del tensors["model.norm.weight"]
        case "other norm":
            tensors["model.norm.weight"] = torch.ones(31)
        case "stranger":
            tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
        case "two layers":
            config["num_hidden_layers"] = 2
        case "wider":
            config["intermediate_size"] = 64
        case "quantised":
            stated |= {"format": "pack-quantized", "config_groups": {"group_0": {}}}
        case "marlin":
            stated |= {"format": "marlin-24"}
        case "dense":
            stated["sparsity_config"]["format"] = "dense"
        case "other format":
            stated["sparsity_config"]["format"] = "sparse-new"
        case "nothing":
            del config["quantization_config"]
        case "packed":
            config["quantization_config"] = {"quant_method": "moiety"}
        case "architecture":
            config["model_type"] = "nobody"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sparse24", "bit", f"{UP}.compressed: expected exactly 2:4"),
        ("sparse", "bit", rf"{UP}\.bitmask: expected one bit for each"),
        ("sparse", "offsets", rf"{UP}\.row_offsets"),
        ("sparse24", "nan", rf"{UP}\.compressed: expected finite"),
        ("sparse", "nan", rf"{UP}\.compressed: expected finite"),
        ("sparse24", "shape", rf"{UP}\.shape: expected \(48, 32\).* \(47, 32\)"),
        ("sparse24", "fp8", rf"{UP}\.compressed: expected values in bf16"),
        ("sparse", "fp8", rf"{UP}\.compressed: expected bf16"),
        ("sparse24", "no bitmask", rf"{UP}\.bitmask .*missing"),
        ("sparse24", "no module", rf"{UP}\.weight is missing"),
        ("sparse24", "no norm", r"model\.norm\.weight is missing"),
        ("sparse24", "other norm", r"model\.norm\.weight: expected shape \(32,\)"),
        ("sparse24", "stranger", "weight_scale has no place"),
        ("sparse24", "two layers", r"model\.layers\.1\..* is missing"),
        ("sparse24", "wider", r"\.shape: expected"),
        ("sparse24", "quantised", "also quantised .format pack-quantized"),
        ("sparse24", "marlin", "also quantised .format marlin-24"),
        ("sparse24", "dense", "stored dense; remove quantization_config"),
        ("sparse24", "other format", "but it has sparse-new"),
        ("sparse24", "nothing", "but it has none"),
        ("sparse24", "packed", "packed by moiety"),
        ("sparse24", "architecture", "nobody"),
    ],
)
def test_nothing_is_taken_on_trust(tmp_path: Path, name: str, change: str, message: str) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "old")
    damage(tmp_path / "old", change)
    with pytest.raises(InputError, match=message):
        rescue(tmp_path / "old", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_compressed_experts_and_full_matrices_are_refused(packs: Any, tmp_path: Path) -> None:
    form = "sparse-24-bitmask"
    folder = write_old(
        packs.tiny_mixtral(), tmp_path / "a", form, lambda n: n.endswith("w1.weight")
    )
    with pytest.raises(InputError, match=r"all matrices of model\.layers\.0\.mlp\.experts"):
        rescue(folder, tmp_path / "out")
    folder = write_old(
        packs.tiny_mixtral(), tmp_path / "b", "sparse-bitmask", lambda n: "norm" in n
    )
    with pytest.raises(InputError, match="every compressed one is full"):
        rescue(folder, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputError, match="holds files"):
        rescue(GOLDEN / "sparse24", tmp_path / "out")
