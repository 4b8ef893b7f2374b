"""`python -m benchmarks.routers RECIPE [--json FILE]`: every router on the same sparse experts.

RECIPE is one that `moiety demo` writes: finetunes with calibration and held-out text. Controls,
mergekit-moe's gates, closed forms and trained gates are judged on held-out text, on text that
switches domain in the middle, and on text of a domain that no expert knows; `twins` says what
routers make of two experts of one domain. With --json rows are kept as they are measured, and a
stopped run goes on with the first that is missing. Takes an hour on two cores; --only for a part.
Where other things run on the machine, `--timing skip` leaves out all times, and `--timing only`
later fits the rows of FILE again, alone, for them.
"""

import argparse
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.routing_measures import (
    Policy,
    Reading,
    decode_overhead,
    read,
    routing_figures,
    shares_after,
)
from benchmarks.routing_models import Kind, Made, Workshop
from benchmarks.routing_rows import BEST, CONTEXT, PLAIN, Row, all_rows, controls
from benchmarks.routing_tables import tables
from benchmarks.routing_texts import Texts, read_texts
from benchmarks.tables import device
from moiety.compose.composite import Composite
from moiety.compose.recipe import Recipe
from moiety.errors import InputError
from moiety.files import digest, read_json, write_json
from moiety.routers import per_token
from moiety.routers.labelled import LabelledText, of_domain
from moiety.scoring import score
from moiety.text import Windows

WINDOWS, QUICK_WINDOWS = 32, 4
TRAIN_STEPS, QUICK_STEPS = 60, 2
PLAIN_ROWS: dict[Kind, Row] = {
    "routed": Row(name="plain", k=1),
    "mixture": Row(name="plain", kind="mixture", k=2, router=None),
}
TWINS: dict[str, dict[str, Any]] = {
    BEST: {"context": []},
    f"{BEST}, context 8+32+128": {"context": CONTEXT},
}


class Bench:
    """All measurements of one recipe; composites that several rows need are kept open."""

    def __init__(self, shop: Workshop, texts: Texts, timing: str = "with") -> None:
        self.shop, self.texts, self.timing = shop, texts, timing
        self.batch_size = shop.recipe.batch_size
        self._plain: dict[Kind, Composite] = {}
        self._oracle: dict[Kind, tuple[dict[str, Reading], Reading]] = {}

    def row(self, row: Row) -> dict[str, Any]:
        """Everything that is measured of one router."""
        made = self._made(row)
        policy = None if row.control is None else controls(self.shop.recipe.seed)[row.control]
        readings = {
            domain: self._read(made.composite, text, policy and policy())
            for domain, text in self.texts.heldout.items()
        }
        switched = self._read(made.composite, self.texts.switched, policy and policy())
        foreign = self._read(made.composite, self.texts.foreign, policy and policy())
        oracle, oracle_switched = self.oracle(row.kind)
        return {
            "router": row.name,
            "composite": row.kind,
            "fit": row.fit,
            "k": row.k,
            "loss": {domain: reading.loss for domain, reading in readings.items()},
            "regret": _mean(readings) - _mean(oracle),
            **routing_figures(readings, len(made.composite.experts)),
            **self._times(row, made),
            "foreign_loss": None if row.control == "oracle" else foreign.loss,
            "switch": {
                "loss": switched.loss,
                "regret": switched.loss - oracle_switched.loss,
                "share_at": shares_after(switched.own_WC, self.texts.half),
            },
        }

    def times(self, row: Row) -> dict[str, float | None]:
        """The times alone, of a router that is made anew."""
        return self._times(row, self._made(row))

    def _times(self, row: Row, made: Made) -> dict[str, float | None]:
        share, extra, timed = None, None, self.timing != "skip"
        if timed and row.control is None:
            share, extra = self._overhead(row.kind, made.composite)
        fitted = made.seconds if timed else None
        return {
            "fit_seconds": 0.0 if row.fit == "none" else fitted,
            "decode_overhead": share,
            "decode_milliseconds": extra,
        }

    def _made(self, row: Row) -> Made:
        if row.mergekit is not None:
            return self.shop.of_mergekit(row.mergekit, row.k)
        if row.route is None and row.router in (None, PLAIN):
            return Made(composite=self.plain(row.kind), seconds=0.0)
        return self.shop.make(row.kind, row.k, row.router, row.route)

    def plain(self, kind: Kind) -> Composite:
        """The composite whose gates look at the token alone and prefer no expert."""
        if kind not in self._plain:
            row = PLAIN_ROWS[kind]
            self._plain[kind] = self.shop.make(kind, row.k, row.router).composite
        return self._plain[kind]

    def oracle(self, kind: Kind) -> tuple[dict[str, Reading], Reading]:
        """Held-out and switched text with every token sent to its own expert."""
        if kind not in self._oracle:
            composite = self.plain(kind)
            heldout = {
                domain: self._read(composite, text, per_token)
                for domain, text in self.texts.heldout.items()
            }
            self._oracle[kind] = (heldout, self._read(composite, self.texts.switched, per_token))
        return self._oracle[kind]

    def _read(self, composite: Composite, text: LabelledText, policy: Policy | None) -> Reading:
        return read(composite.model, text, policy, self.batch_size)

    def _overhead(self, kind: Kind, composite: Composite) -> tuple[float, float]:
        return decode_overhead(
            composite.model, self.plain(kind).model, self.texts.switched.ids_WC[0]
        )

    @cached_property
    def base(self) -> dict[str, float]:
        """The base's loss on held-out text and on the foreign domain."""
        model = AutoModelForCausalLM.from_pretrained(self.shop.recipe.base, dtype="auto").eval()
        texts = {**self.texts.heldout, "foreign": self.texts.foreign}
        return {
            name: score(model, _windows(text), self.batch_size).loss for name, text in texts.items()
        }

    def twins(self, name: str, router: dict[str, Any]) -> dict[str, Any]:
        """How a domain's text is shared out between two experts pruned on halves of it."""
        made = self.shop.split(name).make("routed", 1, router, {})
        own = made.composite.experts.index(f"{name}_a")
        windows = _windows(self.texts.heldout[name])
        each = {letter: of_domain(windows, own + place) for place, letter in enumerate("ab")}
        shares = {
            letter: float(self._read(made.composite, text, None).own_WC[text.own_WC >= 0].mean())
            for letter, text in each.items()
        }
        forced = {
            letter: self._read(made.composite, text, per_token).loss
            for letter, text in each.items()
        }
        loss = self._read(made.composite, each["a"], None).loss
        others = 1 - sum(shares.values())
        return {
            "domain": name,
            "shares": {**shares, "others": others},
            "loss": loss,
            "loss_of_one": forced,
        }


def _windows(text: LabelledText) -> Windows:
    counts_W = text.mask_WC.sum(1)
    places_W = torch.arange(len(text))
    return Windows(ids_WC=text.ids_WC, mask_WC=text.mask_WC, document_W=places_W, bytes_W=counts_W)


def _mean(readings: dict[str, Reading]) -> float:
    return sum(reading.loss for reading in readings.values()) / len(readings)


class Record:
    """What is measured so far, kept in a file if one is named; never one of other settings."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "rows": [], "twins": []}
        if path is not None and path.is_file():
            self.content = read_json(path)
            if self.content.get("run") != head["run"]:
                raise InputError(
                    f"expected {path} to be of this recipe and these settings, but it is of "
                    "others; name another file or remove it"
                )

    def has(self, part: str, key: str) -> bool:
        """Whether a row is there."""
        return any(row["key"] == key for row in self.content[part])

    def add(self, part: str, key: str, row: dict[str, Any]) -> None:
        """Keep one more row."""
        self.content[part].append({"key": key, **row})
        self.save()

    def change(self, part: str, key: str, values: dict[str, Any]) -> None:
        """Other values of a row that is there."""
        [row] = [row for row in self.content[part] if row["key"] == key]
        row.update(values)
        self.save()

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.content)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="benchmarks.routers", description=__doc__)
    made.add_argument("recipe", type=Path, help="a recipe with held-out text")
    made.add_argument("--json", type=Path, help="keep the rows in this file")
    made.add_argument("--quick", action="store_true", help="tiny text, to see that all runs")
    made.add_argument("--windows", type=int, help=f"held-out windows a domain ({WINDOWS})")
    made.add_argument("--train-steps", type=int, help=f"of trained routers ({TRAIN_STEPS})")
    made.add_argument("--only", default="", help="rows whose key matches this regular expression")
    made.add_argument(
        "--fit-windows", type=int, help="calibration windows a domain (all the recipe's)"
    )
    made.add_argument("--work", type=Path, help="stages are kept here (beside --json)")
    made.add_argument("--threads", type=int, help="torch threads")
    made.add_argument(
        "--timing",
        choices=("with", "skip", "only"),
        default="with",
        help="times with the rest, not at all, or alone for the rows in --json",
    )
    return made


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every row that is asked for and not there yet, or the times of those that are."""
    quick, timing = arguments.quick, arguments.timing
    windows = arguments.windows or (QUICK_WINDOWS if quick else WINDOWS)
    steps = arguments.train_steps or (QUICK_STEPS if quick else TRAIN_STEPS)
    recipe = Recipe.read(arguments.recipe)
    evaluate = recipe.evaluate.model_copy(update={"windows": windows})
    recipe = recipe.model_copy(update={"evaluate": evaluate})
    work = arguments.work or (arguments.json or Path("routers")).with_suffix(".work")
    shop = Workshop(recipe, work.absolute(), arguments.fit_windows, sharing=timing != "only")
    texts = read_texts(recipe, shop.builder("routed", 1).tokenizer, 1 if quick else 4)
    bench = Bench(shop, texts, timing)
    record = Record(arguments.json, _head(recipe, windows, steps, arguments.fit_windows))
    wanted, console = re.compile(arguments.only), Console(stderr=True)
    for row in all_rows(recipe.names, recipe.seed, steps):
        known = record.has("rows", row.key)
        if not wanted.search(row.key) or known != (timing == "only"):
            continue
        console.print(row.key)
        if known:
            record.change("rows", row.key, bench.times(row))
        else:
            record.add("rows", row.key, bench.row(row))
    if timing != "only":
        _beside_rows(bench, record, wanted, console)
    return record.content


def _head(recipe: Recipe, windows: int, steps: int, fit_windows: int | None) -> dict[str, Any]:
    settings = {
        "recipe": recipe.model_dump(mode="json"),
        "steps": steps,
        "fit_windows": fit_windows,
    }
    return {
        "run": digest(settings),
        "device": device(),
        "threads": torch.get_num_threads(),
        "context_length": recipe.context_length,
        "context": list(CONTEXT),
        "seed": recipe.seed,
        "windows": windows,
        "fit_windows": fit_windows or recipe.calibration_windows,
        "train_steps": steps,
    }


def _beside_rows(bench: Bench, record: Record, wanted: re.Pattern[str], console: Console) -> None:
    """Twins, and the base's losses."""
    names = bench.shop.recipe.names
    for name, router in TWINS.items():
        if wanted.search(f"twins: {name}") and not record.has("twins", name):
            console.print(f"twins: {name}")
            record.add("twins", name, bench.twins(names[0], router))
    if "base" not in record.content:
        record.content["base"] = bench.base
        record.save()


def main() -> None:
    """Measure, print the tables."""
    arguments = parser().parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    console = Console()
    console.width = max(console.width, 150)
    for table in tables(measure(arguments)):
        console.print(table)


if __name__ == "__main__":
    main()
