"""A trace holds what the gates chose, for every token and no padding."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
import torch
from torch.nn.functional import cross_entropy

from moiety.analysis.trace import Trace, trace_model
from moiety.analysis.trace.file import HEADER, ROUTES
from moiety.errors import InputError, OutputError
from moiety.routers.gates import find_gates, forced, uniform
from moiety.text import Windows, token_windows

TEXTS = {
    "law": ["The court of appeal held that the court of appeal held.", "Short text, but enough."],
    "mixed": ["天気がいい 🌞 naïve café\nend of it", "👩‍👩‍👧 family and 漢字 together, once more."],
}
CONTEXT = 12


@pytest.fixture
def data(tokenizer: Any) -> dict[str, Windows]:
    return {
        name: token_windows(tokenizer, documents, CONTEXT, minimum=3)
        for name, documents in TEXTS.items()
    }


@pytest.fixture
def traced(model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path) -> Trace:
    return Trace.open(trace_model(model, tokenizer, data, tmp_path / "trace", batch_size=3))


def by_hand(model: Any, windows: Windows, row: int) -> tuple[list[Any], torch.Tensor]:
    """The gates' outputs and the losses of one window alone, without padding."""
    ids_1C = windows.ids_WC[row : row + 1, : int(windows.mask_WC[row].sum())]
    outputs: list[Any] = []
    hooks = [
        gate.module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for gate in find_gates(model)
    ]
    with torch.no_grad():
        logits_CV = model(input_ids=ids_1C).logits[0]
    for hook in hooks:
        hook.remove()
    return outputs, cross_entropy(logits_CV[:-1], ids_1C[0, 1:], reduction="none")


def test_rows_equal_the_gates_called_by_hand(
    model: Any, data: dict[str, Windows], traced: Trace
) -> None:
    start = 0
    for windows in data.values():
        for row in range(len(windows)):
            outputs, losses = by_hand(model, windows, row)
            rows = slice(start, start + len(losses) + 1)
            for layer, (logits_TE, weights_TA, experts_TA) in enumerate(outputs):
                probabilities = logits_TE.float().softmax(-1)
                entropy_T = -(probabilities * probabilities.log()).sum(-1)
                assert numpy.array_equal(traced.experts_TLA[rows, layer], experts_TA)
                numpy.testing.assert_allclose(
                    traced.weights_TLA[rows, layer], weights_TA, atol=1e-5
                )
                numpy.testing.assert_allclose(traced.entropy_TL[rows, layer], entropy_T, atol=1e-4)
            assert numpy.isnan(traced.loss_T[start])
            numpy.testing.assert_allclose(traced.loss_T[start + 1 : rows.stop], losses, atol=1e-4)
            start = rows.stop
    assert start == len(traced)


def test_padding_is_left_out_and_tokens_are_in_order(
    data: dict[str, Windows], traced: Trace
) -> None:
    expected = torch.cat([windows.ids_WC[windows.mask_WC.bool()] for windows in data.values()])
    assert numpy.array_equal(traced.token_id_T, expected)
    assert sum(traced.header.tokens.values()) == len(traced)
    assert traced.header.domains == ("law", "mixed")


def test_texts_join_to_the_documents(traced: Trace) -> None:
    assert traced.header.documents == {"law": 2, "mixed": 2}
    order = numpy.lexsort((traced.position_T, traced.window_T, traced.document_T))
    pieces = traced.texts(order)
    document_T = traced.document_T[order]
    for document, text in enumerate([*TEXTS["law"], *TEXTS["mixed"]]):
        own = [pieces[at] for at in numpy.flatnonzero(document_T == document)]
        joined = "".join(own)
        if "\N{REPLACEMENT CHARACTER}" not in joined:
            assert joined == text
        assert own[0] == ""


@pytest.mark.parametrize(
    "text", ["🌞🌞 漢字", "naïve ﷽ 👩‍👩‍👧", "plain", "\N{REPLACEMENT CHARACTER}x"]
)
def test_pieces_of_a_whole_window_join_exactly(tokenizer: Any, text: str) -> None:
    from moiety.analysis.trace.pieces import Pieces

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer)([tokenizer.bos_token_id, *ids])
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == text


def test_forced_routes_are_recorded_as_forced(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    with forced(find_gates(model), uniform()):
        found = Trace.open(trace_model(model, tokenizer, data, tmp_path / "trace"))
    assert found.header.active == len(found.header.experts)
    assert (found.weights_TLA == 0.25).all()


def test_training_mode_is_restored(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    model.train()
    trace_model(model, tokenizer, data, tmp_path / "trace", experts=["a", "b", "c", "d"])
    assert model.training


def test_parquet_says_what_it_holds(traced: Trace, tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(tmp_path / "trace" / ROUTES)
    assert set(table.column("phase").to_pylist()) == {"prefill"}
    assert table.column("loss").null_count == int(numpy.isnan(traced.loss_T).sum())
    header = json.loads((tmp_path / "trace" / HEADER).read_text())
    assert header["format"] == "moiety.trace"
    assert header["version"] == 1


def test_wrong_inputs_are_refused(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    out = tmp_path / "trace"
    law = data["law"]
    empty = dataclasses.replace(law, mask_WC=torch.zeros_like(law.mask_WC))
    with pytest.raises(InputError, match="name each of the 4 experts once"):
        trace_model(model, tokenizer, data, out, experts=["a", "a", "b", "c"])
    with pytest.raises(InputError, match="at least one domain"):
        trace_model(model, tokenizer, {}, out)
    with pytest.raises(InputError, match="'law' has none"):
        trace_model(model, tokenizer, {"law": empty}, out)
    with pytest.raises(InputError, match="has no gates"):
        trace_model(torch.nn.Linear(2, 2), tokenizer, data, out)
    assert not out.exists()
    out.mkdir()
    (out / "kept").write_text("x")
    with pytest.raises(OutputError, match="absent or empty"):
        trace_model(model, tokenizer, data, out)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_broken_traces_are_refused(plant: Any) -> None:
    path: Path = plant()
    whole = (path / ROUTES).read_bytes()
    header = (path / HEADER).read_text()
    with pytest.raises(InputError, match="expected a trace folder"):
        Trace.open(path / "absent")
    for changes, said in (
        ({"version": 2}, "expected version 1"),
        ({"format": "other"}, "moiety.trace"),
        ({"active": 9}, "active must be"),
        ({"active": 1}, "expected the columns"),
        ({"tokens": {"arithmetic": 3}}, "documents must"),
        ({"experts": ["a", "b"]}, r"expected experts 0\.\.1"),
        ({"surprise": 1}, "expected the fields"),
        ({"context_length": "a"}, "context_length and vocabulary must be"),
        ({"experts": ["a", "a", "b", "c"]}, "each once"),
        ({"documents": dict.fromkeys(("arithmetic", "code", "law", "prose"), 0)}, "documents must"),
    ):
        _edit(path / HEADER, **changes)
        with pytest.raises(InputError, match=said):
            Trace.open(path)
        (path / HEADER).write_text(header)
    (path / ROUTES).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut short"):
        Trace.open(path)
    (path / ROUTES).unlink()
    with pytest.raises(InputError, match="expected routes"):
        Trace.open(path)
