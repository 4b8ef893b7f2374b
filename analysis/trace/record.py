"""Record which expert every token of every domain went to, as the gates chose it.

W windows, C context length.
"""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moiety.analysis.trace.columns import Forward, to_columns
from moiety.analysis.trace.file import HEADER, ROUTES, Header
from moiety.analysis.trace.generation import Generation
from moiety.analysis.trace.parts import Parts
from moiety.analysis.trace.pieces import Pieces
from moiety.analysis.trace.watching import Watching, watching
from moiety.compose.opening import open_any
from moiety.documents import digest_documents
from moiety.errors import InputError
from moiety.experts.checkpoint import digest_of_model, local_folder
from moiety.files import check_new_folder, new_folder, write_json
from moiety.progress import SILENT, Progress
from moiety.routers.gates import Gate
from moiety.text import Windows, read_documents, token_windows


def trace(
    model: str | Path,
    data: Mapping[str, str | Path],
    out: str | Path,
    *,
    context_length: int = 512,
    windows: int = 64,
    batch_size: int = 8,
    new_tokens: int = 0,
    progress: Progress = SILENT,
) -> Path:
    """Trace a composite or any transformers MoE (folder or hub id) over labelled text files.

    `data` gives each domain's text (file or folder), at most `windows` windows of it are used.
    With `new_tokens` the windows are prompts, after which so many tokens are written greedily. A
    killed run goes on from `OUT.parts` when it is started again with the same model, text and
    settings. See `trace_model`. Raises InputError or OutputError before any long work.
    """
    out = Path(out)
    check_new_folder(out)
    documents = {domain: read_documents(path) for domain, path in data.items()}
    composite = open_any(model)
    cut = {
        domain: token_windows(composite.tokenizer, texts, context_length, windows)
        for domain, texts in documents.items()
    }
    key = {
        "model": digest_of_model(local_folder(model)),
        "documents": {name: digest_documents(texts) for name, texts in documents.items()},
        "settings": [context_length, windows, batch_size, new_tokens],
    }
    return trace_model(
        composite.model,
        composite.tokenizer,
        cut,
        out,
        experts=composite.experts or None,
        batch_size=batch_size,
        new_tokens=new_tokens,
        key=key,
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
    new_tokens: int = 0,
    key: Any = None,
    progress: Progress = SILENT,
) -> Path:
    """Run a mixture of experts over labelled windows and write the routes to the folder `out`.

    `data` names each domain's windows, `experts` the experts in the order of the gates' indices.
    Routes are what the gates gave, sorted by weight; routes forced with `moiety.routers.gates`
    are recorded as forced. Losses are in nats, entropies of the gates' softmax too. With
    `new_tokens` routes are those of `generate` (see `Generation`). Memory is bounded: about 65
    thousand tokens are held. With a `key` (JSON values that name model, text and settings) rows
    are kept in `OUT.parts` until the trace is whole, and a run of the same key goes on from
    there. `Trace.open(out)` reads the result.

    Raises InputError when the model has no gates, its gates differ in size, `experts` does not
    name each expert once, or a domain has no windows; OutputError when `out` cannot be made.
    """
    watched = watching(model)
    names = _expert_names(watched.gates, experts)
    _check(data, batch_size, new_tokens)
    check_new_folder(out)
    reader = _reader(model, tokenizer, watched, new_tokens)
    with _parts(out, key) as parts, _evaluating(model):
        batches = list(_batches(data, batch_size))
        pieces = Pieces(tokenizer)

        def rows() -> Iterator[tuple[str, dict[str, Any]]]:
            left = batches[parts.done :]
            for domain, batch, document_W, window_W in progress.track(left, "trace", len(left)):
                tokens, layers = reader(batch)
                yield domain, to_columns(tokens, layers, document_W, window_W, pieces)

        parts.extend(rows())
        with new_folder(out) as scratch:
            tokens, active = parts.join(scratch / ROUTES, len(reader.layers()))
            header = Header(
                model=str(getattr(model.config, "name_or_path", "") or type(model).__name__),
                experts=names,
                layers=tuple(gate.name for gate in reader.layers()),
                active=active,
                tokens={name: tokens[name] for name in data},
                documents={name: len(each.document_W.unique()) for name, each in data.items()},
                context_length=max(each.ids_WC.shape[1] for each in data.values()),
                vocabulary=len(tokenizer),
            )
            write_json(scratch / HEADER, header.to_dict())
        parts.remove()
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


def _check(data: Mapping[str, Windows], batch_size: int, new_tokens: int) -> None:
    if not data:
        raise InputError("data must name at least one domain, but it is empty")
    for domain, windows in data.items():
        if len(windows) == 0 or not bool(windows.mask_WC.any()):
            raise InputError(f"data must give windows for each domain, but {domain!r} has none")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, but it is {batch_size}")
    if new_tokens < 0 or new_tokens == 1:
        raise InputError(
            f"new_tokens must be 0, or at least 2 (the last one has no routes), but it is {new_tokens}"
        )


def _reader(
    model: Any, tokenizer: PreTrainedTokenizerBase, watched: Watching, new_tokens: int
) -> Forward | Generation:
    if not new_tokens:
        return Forward(model, watched)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(int(one) for one in ids if isinstance(one, int))
    return Generation(model, watched, new_tokens, padding)


@contextlib.contextmanager
def _parts(out: Path, key: Any) -> Iterator[Parts]:
    """Where rows are kept until the trace is whole: beside it with a key, else for this run."""
    if key is not None:
        yield Parts(out.with_name(f"{out.name}.parts"), key)
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        yield Parts(Path(folder) / "parts", None)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _batches(
    data: Mapping[str, Windows], batch_size: int
) -> Iterator[tuple[str, Windows, Tensor, Tensor]]:
    """Batches with their domain, the numbers of their documents and those of their windows."""
    first_document = 0
    for domain, windows in data.items():
        seen: Counter[int] = Counter()
        for batch in windows.batches(batch_size):
            numbers: list[int] = []
            for document in batch.document_W.tolist():
                numbers.append(seen[document])
                seen[document] += 1
            yield domain, batch, batch.document_W + first_document, torch.tensor(numbers)
        first_document += int(windows.document_W.max()) + 1
