"""Standard tasks through lm-eval (the `eval` extra), on any model that moiety opens."""

import contextlib
import difflib
import importlib
import importlib.util
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from datasets.exceptions import DatasetsError

from moiety.analysis.tables import ABSENT, Table
from moiety.compose.composite import Composite
from moiety.compose.opening import open_any
from moiety.errors import InputError
from moiety.progress import SILENT, Progress

NEAR = 5
NOT_ASKED = {"get_git_commit_hash": lambda: None, "add_env_info": lambda _results: None}
"""What lm-eval would run git, pip and lscpu for, printing and taking seconds for each task."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, ImportError, DatasetsError)


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task over `documents` documents, as lm-eval gives it.

    `filter` names what was done to the answers first (`none` as a rule); `stderr` is None where
    lm-eval states no standard error.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    documents: int
    shots: int

    @property
    def label(self) -> str:
        """The metric, with the filter if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run: at most `limit` documents each, `num_fewshot` examples in the prompt.

    None leaves either to the task. Nothing is fetched unless `online`; data that is local or
    cached needs no network. Raises InputError for numbers out of range.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    online: bool = False

    def __post_init__(self) -> None:
        least = {"limit": 1, "num_fewshot": 0, "batch_size": 1}
        for field, smallest in least.items():
            value = getattr(self, field)
            if value is not None and value < smallest:
                raise InputError(f"{field} must be at least {smallest}, but it is {value}")


class Tasks:
    """Tasks that lm-eval knows, or that YAML files below `include_path` define.

    Such files may name Python functions, which run: include only folders you trust. Raises
    InputError when lm-eval is absent, a name is unknown or the folder is no folder.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError(
                "expected lm-eval to run tasks, but it is not installed; "
                'install it with: pip install "moiety[eval]"'
            )
        self.names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
        if not self.names:
            raise InputError("expected at least one task, but none was given; name one")
        if include_path is not None and not Path(include_path).is_dir():
            raise InputError(f"expected a folder of tasks at {include_path}, but there is none")
        self.manager = _manager(self.names, include_path, progress)
        unknown = [name for name in self.names if name not in self.manager.all_tasks]
        if unknown:
            raise InputError(_unknown(unknown[0], self.manager.all_tasks, include_path))

    def run(
        self,
        composite: Composite,
        settings: TaskSettings | None = None,
        progress: Progress = SILENT,
    ) -> list[TaskScore]:
        """Every metric of every task; can be called for one model after another."""
        settings = settings or TaskSettings()
        scores: dict[tuple[str, str, str], TaskScore] = {}
        for name in progress.track(self.names, "lm-eval tasks", len(self.names)):
            with _quiet(), contextlib.nullcontext() if settings.online else _offline():
                task = self._loaded(name, settings.online)
                results = self._evaluated(name, task, composite, settings)
            scores |= {(s.task, s.metric, s.filter): s for s in _scores(results)}
        return list(scores.values())

    def _loaded(self, name: str, online: bool) -> list[Any]:
        """A task or group with its data, or the tasks of a tag."""
        try:
            loaded = self.manager.load([name])
        except UNREADABLE as error:
            mend = "" if online else "; give --online if its data has to be fetched first"
            raise InputError(f"task {name} cannot be prepared: {error}{mend}") from error
        if name in loaded["groups"]:
            return [loaded["groups"][name]]
        return list(loaded["tasks"].values())

    def _evaluated(
        self, name: str, task: list[Any], composite: Composite, settings: TaskSettings
    ) -> Mapping[str, Any]:
        library: Any = importlib.import_module("lm_eval")
        models: Any = importlib.import_module("lm_eval.models.huggingface")
        wrapped = models.HFLM(
            pretrained=composite.model,
            tokenizer=composite.tokenizer,
            backend="causal",
            batch_size=settings.batch_size,
        )
        try:
            with mock.patch.multiple("lm_eval.evaluator", create=True, **NOT_ASKED):
                results = library.simple_evaluate(
                    model=wrapped,
                    tasks=task,
                    task_manager=self.manager,
                    limit=settings.limit,
                    num_fewshot=settings.num_fewshot,
                    batch_size=settings.batch_size,
                    log_samples=False,
                )
        except ValueError as error:
            raise InputError(f"lm-eval refuses task {name}: {error}") from error
        assert results is not None
        return results


def run_tasks(
    model: str | Path | Composite,
    tasks: Sequence[str],
    settings: TaskSettings | None = None,
    *,
    include_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> list[TaskScore]:
    """Run lm-eval tasks on a model (folder, hub id or already open) and give every metric.

    `include_path` is a folder with task files of your own. Prompts, seeds and metrics are
    lm-eval's. Raises InputError for an unknown task or data that is not there.
    """
    found = Tasks(tasks, include_path, progress)
    composite = model if isinstance(model, Composite) else open_any(model)
    return found.run(composite, settings, progress)


def tasks_table(scores: Sequence[TaskScore]) -> Table:
    """One row for each metric of each task."""
    rows = tuple(
        (
            score.task,
            score.label,
            f"{score.value:.4f}",
            ABSENT if score.stderr is None else f"{score.stderr:.4f}",
            f"{score.documents:,}",
            str(score.shots),
        )
        for score in scores
    )
    columns = ("task", "metric", "value", "stderr", "n", "shots")
    return Table(title="lm-eval", columns=columns, rows=rows)


def _manager(names: Sequence[str], include_path: str | Path | None, progress: Progress) -> Any:
    """lm-eval's index of tasks; its own thousands are read only when one of them is asked for."""
    path = None if include_path is None else str(include_path)
    with _quiet():
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_path=path, include_defaults=False)
    if set(names) <= set(own.all_subtasks):
        return own
    progress.note("reading lm-eval's task files")
    with _quiet():
        return TaskManager(include_path=path)


def _unknown(name: str, known: Sequence[str], include_path: str | Path | None) -> str:
    near = difflib.get_close_matches(name, known, n=NEAR)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
    where = "" if include_path is None else f" or in {include_path}"
    return f"expected a task of lm-eval{where}, but there is no {name!r}; {hint}"


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            yield TaskScore(
                task=task,
                metric=metric,
                filter=filtered,
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                documents=int(values["sample_len"]),
                shots=int(results["n-shot"].get(task) or 0),
            )


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Hub and datasets libraries use what is on this machine, here and in child processes."""
    import huggingface_hub
    from datasets import config

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    with (
        mock.patch.dict(os.environ, dict.fromkeys(names, "1")),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(config, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log, bars, prints and warnings go nowhere."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
