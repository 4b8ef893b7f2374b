"""Record which expert every token of every domain went to, as the gates chose it.

W windows, C context length, T tokens (padding left out), L routed layers, A active experts,
E experts, V vocabulary.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moiety.analysis.trace.file import HEADER, ROUTES, Header, Trace
from moiety.analysis.trace.pieces import Pieces
from moiety.analysis.trace.writer import RouteWriter
from moiety.compose.composite import open_composite
from moiety.errors import InputError
from moiety.files import check_new_folder, new_folder, write_json
from moiety.progress import SILENT, Progress
from moiety.routers.gates import Gate, Route, find_gates, watched
from moiety.scoring import token_losses
from moiety.text import Windows, read_documents, token_windows

__all__ = ["Trace", "trace", "trace_model"]


def trace(
    model: str | Path,
    data: Mapping[str, str | Path],
    out: str | Path,
    *,
    context_length: int = 512,
    windows: int = 64,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> Path:
    """Trace a composite or any transformers MoE (folder or hub id) over labelled text files.

    `data` gives each domain's text (file or folder), at most `windows` windows of it are used.
    See `trace_model`. Raises InputError or OutputError before any long work.
    """
    check_new_folder(Path(out))
    documents = {domain: read_documents(path) for domain, path in data.items()}
    composite = open_composite(model)
    cut = {
        domain: token_windows(composite.tokenizer, texts, context_length, windows)
        for domain, texts in documents.items()
    }
    return trace_model(
        composite.model,
        composite.tokenizer,
        cut,
        Path(out),
        experts=composite.experts,
        batch_size=batch_size,
        progress=progress,
    )


def trace_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Windows],
    out: Path,
    *,
    experts: Sequence[str] | None = None,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> Path:
    """Run a mixture of experts over labelled windows and write the routes to the folder `out`.

    `data` names each domain's windows, `experts` the experts in the order of the gates' indices.
    Routes are what the gates gave, sorted by weight; routes forced with `moiety.routers.gates`
    are recorded as forced. Losses are in nats, entropies of the gates' softmax too. Memory is
    bounded: about 65 thousand tokens are held. `Trace.open(out)` reads the result.

    Raises InputError when the model has no gates, its gates differ in size, `experts` does not
    name each expert once, or a domain has no windows; OutputError when `out` cannot be made.
    """
    gates = find_gates(model)
    names = _expert_names(gates, experts)
    _check_data(data, batch_size)
    with new_folder(out) as scratch, _evaluating(model):
        recorder = _Recorder(model, gates, Pieces(tokenizer))
        with RouteWriter(scratch / ROUTES) as writer:
            for domain, windows, first_document in _domains(data):
                _record(recorder, writer, domain, windows, first_document, batch_size, progress)
        header = Header(
            model=str(getattr(model.config, "name_or_path", "") or type(model).__name__),
            experts=names,
            layers=tuple(gate.name for gate in gates),
            active=writer.active,
            tokens=dict(writer.tokens),
            documents={name: len(windows.document_W.unique()) for name, windows in data.items()},
            context_length=max(windows.ids_WC.shape[1] for windows in data.values()),
            vocabulary=len(tokenizer),
        )
        write_json(scratch / HEADER, header.to_dict())
    return out


def _expert_names(gates: Sequence[Gate], names: Sequence[str] | None) -> tuple[str, ...]:
    sizes = {gate.experts for gate in gates}
    if len(sizes) > 1:
        raise InputError(
            f"expected all gates to choose from equally many experts, but they have {sorted(sizes)}"
        )
    count = sizes.pop()
    chosen = tuple(names) if names is not None else tuple(f"expert {i}" for i in range(count))
    if len(chosen) != count or len(set(chosen)) != count:
        raise InputError(f"experts must name each of the {count} experts once, but is {chosen}")
    return chosen


def _check_data(data: Mapping[str, Windows], batch_size: int) -> None:
    if not data:
        raise InputError("data must name at least one domain, but it is empty")
    for domain, windows in data.items():
        if len(windows) == 0 or not bool(windows.mask_WC.any()):
            raise InputError(f"data must give windows for each domain, but {domain!r} has none")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, but it is {batch_size}")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _domains(data: Mapping[str, Windows]) -> Iterator[tuple[str, Windows, int]]:
    first_document = 0
    for domain, windows in data.items():
        yield domain, windows, first_document
        first_document += int(windows.document_W.max()) + 1


def _record(
    recorder: "_Recorder",
    writer: "RouteWriter",
    domain: str,
    windows: Windows,
    first_document: int,
    batch_size: int,
    progress: Progress,
) -> None:
    seen: Counter[int] = Counter()
    batches = windows.batches(batch_size)
    count = -(-len(windows) // batch_size)
    for batch in progress.track(batches, f"trace {domain}", count):
        numbers: list[int] = []
        for document in batch.document_W.tolist():
            numbers.append(seen[document])
            seen[document] += 1
        columns = recorder(batch, torch.tensor(numbers))
        columns["document"] += first_document
        writer.add(domain, columns)


class _Recorder:
    """Turns a batch of windows into columns, one row a token."""

    def __init__(self, model: Any, gates: Sequence[Gate], pieces: Pieces) -> None:
        self._model = model
        self._gates = gates
        self._pieces = pieces
        self._device = model.get_input_embeddings().weight.device

    def __call__(self, batch: Windows, window_W: Tensor) -> dict[str, Any]:
        longest = int(batch.mask_WC.sum(1).max())
        ids_WC, mask_WC = batch.ids_WC[:, :longest], batch.mask_WC[:, :longest]
        routes: list[Route] = []
        with watched(self._gates, routes.append):
            logits_WCV = self._model(
                input_ids=ids_WC.to(self._device),
                attention_mask=mask_WC.to(self._device),
                use_cache=False,
            ).logits
        kept_WC = mask_WC.bool()
        position_WC = torch.arange(longest).expand_as(ids_WC)
        return {
            "document": _cells(batch.document_W[:, None].expand_as(ids_WC), kept_WC),
            "window": _cells(window_W[:, None].expand_as(ids_WC), kept_WC),
            "position": _cells(position_WC, kept_WC),
            "token_id": _cells(ids_WC, kept_WC),
            "text": [
                piece
                for ids_C, kept_C in zip(ids_WC, kept_WC, strict=True)
                for piece in self._pieces(ids_C[kept_C].tolist())
            ],
            "loss": _cells(_losses(logits_WCV, ids_WC, kept_WC), kept_WC),
            **_route_columns(routes, self._gates, kept_WC),
        }


def _cells(values_WC: Tensor, kept_WC: Tensor) -> NDArray[Any]:
    values_T = values_WC[kept_WC].numpy()
    return values_T if values_WC.is_floating_point() else values_T.astype(numpy.int32)


def _losses(logits_WCV: Tensor, ids_WC: Tensor, kept_WC: Tensor) -> Tensor:
    """Nats of predicting each token from those before it; NaN for the first of a window."""
    losses_WC = token_losses(logits_WCV, ids_WC, kept_WC).cpu()
    losses_WC[:, 0] = float("nan")
    return losses_WC


def _route_columns(
    routes: Sequence[Route], gates: Sequence[Gate], kept_WC: Tensor
) -> dict[str, NDArray[Any]]:
    if [route.layer for route in routes] != [gate.layer for gate in gates] or any(
        route.logits_TE.shape[0] != kept_WC.numel() for route in routes
    ):
        raise InputError(
            f"expected each of the {len(gates)} gates to route every token of a batch once, "
            f"but layers {[route.layer for route in routes]} were seen; "
            "pass a model that runs all its layers on one process"
        )
    kept_T = kept_WC.flatten()
    weights_LTA, experts_LTA, entropy_LT = zip(
        *(_layer_columns(route, kept_T) for route in routes), strict=True
    )
    return {
        "weights": rearrange(list(weights_LTA), "L T A -> T (L A)").numpy(),
        "experts": rearrange(list(experts_LTA), "L T A -> T (L A)").numpy(),
        "entropy": rearrange(list(entropy_LT), "L T -> T L").numpy(),
    }


def _layer_columns(route: Route, kept_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept_T = kept_T.to(route.logits_TE.device)
    weights_TA, order_TA = (
        route.weights_TA[kept_T].float().sort(stable=True, dim=-1, descending=True)
    )
    experts_TA = route.experts_TA[kept_T].gather(-1, order_TA).to(torch.int16)
    logs_TE = route.logits_TE[kept_T].float().log_softmax(-1)
    entropy_T = torch.special.entr(logs_TE.exp()).sum(-1)
    return weights_TA.cpu(), experts_TA.cpu(), entropy_T.cpu()
