"""A trace of an ensemble holds its posterior over experts as the route of every token."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from moiety.analysis import summarise
from moiety.analysis.report import Reported
from moiety.analysis.trace import Trace, trace_model
from moiety.analysis.trace.watching import changeable_gates
from moiety.errors import InputError
from moiety.text import Windows, token_windows
from tests.compose.test_ensemble import NAMES, PRIOR, ensemble, text_config

TEXTS = {
    "law": ["The court of appeal held that the court held.", "Held, on appeal, by the court."],
    "code": ["def add(a, b): return a + b", "def sub(a, b): return a - b, and more of it"],
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Three experts that differ."""
    return ensemble(text_config(vocab_size=400, pad_token_id=1, eos_token_id=399), NAMES, PRIOR)


@pytest.fixture
def data(tokenizer: Any) -> dict[str, Windows]:
    return {name: token_windows(tokenizer, docs, 12, minimum=3) for name, docs in TEXTS.items()}


def test_routes_are_the_posterior(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    out = trace_model(model, tokenizer, data, tmp_path / "t", experts=NAMES, batch_size=3)
    found = Trace.open(out)
    assert found.header.layers == ("posterior",)
    assert found.header.experts == NAMES and found.header.active == 3
    first = 0
    for windows in data.values():
        for ids_C, mask_C in zip(windows.ids_WC, windows.mask_WC, strict=True):
            ids_1C = ids_C[mask_C.bool()][None]
            output = model(ids_1C)
            logs_CV = output.logits[0, :-1].log_softmax(-1)
            loss_C = -logs_CV.gather(1, ids_1C[0, 1:, None])[:, 0]
            posterior_CE = output.posterior[0].numpy()
            rows = slice(first, first + ids_1C.shape[1])
            sorted_CE = numpy.take_along_axis(posterior_CE, found.experts_TLA[rows, 0], 1)
            numpy.testing.assert_allclose(found.weights_TLA[rows, 0], sorted_CE, atol=1e-5)
            assert (numpy.diff(found.weights_TLA[rows, 0], axis=1) <= 0).all()
            entropy_C = torch.special.entr(output.posterior[0]).sum(-1)
            numpy.testing.assert_allclose(found.entropy_TL[rows, 0], entropy_C, atol=1e-5)
            numpy.testing.assert_allclose(found.loss_T[rows][1:], loss_C, atol=1e-4)
            first = rows.stop
    assert first == len(found)


def test_generated_text_has_the_posterior_of_one_pass(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    out = trace_model(
        model, tokenizer, data, tmp_path / "g", experts=NAMES, batch_size=3, new_tokens=4
    )
    found = Trace.open(out)
    assert (found.phase_T == 1).any()
    key_T = found.document_T * 1000 + found.window_T
    for key in numpy.unique(key_T):
        rows = numpy.flatnonzero(key_T == key)
        posterior_CE = model(torch.tensor(found.token_id_T[rows])[None].long()).posterior[0].numpy()
        own_CE = numpy.take_along_axis(posterior_CE, found.experts_TLA[rows, 0].astype(int), 1)
        numpy.testing.assert_allclose(found.weights_TLA[rows, 0], own_CE, atol=1e-4)


def test_its_routes_cannot_be_changed(model: Any) -> None:
    with pytest.raises(InputError, match="mixes whole models by their posterior"):
        changeable_gates(model)


def test_a_report_of_it_has_no_figure_of_layers_or_pairs(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    out = trace_model(model, tokenizer, data, tmp_path / "t", experts=NAMES, batch_size=3)
    summary = summarise(Trace.open(out), permutations=19, resamples=19)
    weight_E = numpy.zeros(3)
    traced = Trace.open(out)
    numpy.add.at(weight_E, traced.experts_TLA[:, 0], traced.weights_TLA[:, 0])
    numpy.testing.assert_allclose(summary.load_LE[0], weight_E / len(traced), atol=1e-5)
    assert summary.coactivation is None and summary.flow is None
    names = {figure.name for figure in Reported.read(out).document.figures}
    assert not names & {"coactivation", "flow"}
