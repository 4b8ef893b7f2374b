"""Routes recorded by other engines become the traces they were."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from moiety.analysis import Trace, import_routes, summarise
from moiety.analysis.trace import Shape
from moiety.errors import InputError

SHAPE = Shape(layers=2, active=2, experts=("a", "b", "c", "d"))
ROUTES = numpy.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[0, 2], [1, 3]]])


def lines(path: Path, *rows: Any) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_vllm_and_sglang(tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer("The court held", add_special_tokens=False)["input_ids"][:4]
    packed = base64.b64encode(ROUTES.astype("<i4").tobytes()).decode()
    vllm = {"token_ids": ids, "prompt_tokens": 2, "routed_experts": ROUTES.tolist()}
    sglang = {"token_ids": ids, "meta_info": {"routed_experts": packed, "prompt_tokens": 1}}
    data = {"law": lines(tmp_path / "v", vllm, vllm), "code": lines(tmp_path / "s", sglang)}
    found = Trace.open(import_routes(data, tmp_path / "t", SHAPE, tokenizer=tokenizer))
    assert found.header.documents == {"law": 2, "code": 1}
    assert numpy.array_equal(found.experts_TLA[:3], ROUTES)
    assert numpy.array_equal(found.experts_TLA[6:], ROUTES)
    assert found.phase_T.tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 1]
    assert found.token_id_T[:3].tolist() == ids[:3]
    assert (found.weights_TLA == 0.5).all() and numpy.isnan(found.loss_T).all()
    summary = summarise(found, permutations=9, resamples=9)
    assert json.dumps(summary.to_dict(), allow_nan=False)
    assert summary.phases["decode"].tokens == 4


def test_megatron(tmp_path: Path) -> None:
    rows = [
        {
            "layer": layer,
            "batch_id": batch,
            "topk_experts": ROUTES[:, layer].tolist(),
            "topk_weights": [[0.2, 0.8]] * 3,
        }
        for batch in (0, 1)
        for layer in (1, 0)
    ]
    path = lines(tmp_path / "m", *rows)
    found = Trace.open(import_routes({"all": path}, tmp_path / "t", SHAPE))
    assert found.header.documents == {"all": 2}
    assert numpy.array_equal(found.experts_TLA[:3], ROUTES[..., ::-1])
    numpy.testing.assert_allclose(found.weights_TLA[0, 0], [0.8, 0.2])
    path = lines(tmp_path / "m", *rows[:3])
    with pytest.raises(InputError, match="expected 2 layers of batch 1"):
        import_routes({"all": path}, tmp_path / "u", SHAPE)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "expected routed_experts"),
        ({"routed_experts": [[[0, 1]]]}, r"expected routes \(tokens, 2, 2\)"),
        ({"routed_experts": "%%"}, r"expected routes \(tokens, 2, 2\)"),
        ({"routed_experts": [[[0, 1], [2, 4]]]}, r"expected experts 0\.\.3"),
        ({"routed_experts": ROUTES.tolist(), "token_ids": [1]}, "expected 3 token_ids"),
        ({"routed_experts": ROUTES.tolist(), "prompt_tokens": 0}, "prompt_tokens"),
        ({"routed_experts": ROUTES.tolist(), "routed_weights": [1]}, "as many weights"),
        ([], "expected a JSON object"),
    ],
)
def test_other_lines_are_named(row: Any, said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "x", row)
    with pytest.raises(InputError, match=said):
        import_routes({"all": path}, tmp_path / "t", SHAPE)
    assert not (tmp_path / "t").exists()
    with pytest.raises(InputError, match="but there are none"):
        import_routes({"all": lines(tmp_path / "y")}, tmp_path / "t", SHAPE)
