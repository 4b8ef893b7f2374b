"""The results of experiments.pruning as a page of the documentation.

python -m experiments.pruning_tables experiments/pruning.json > docs/pruning-results.md
"""

import json
import statistics
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moiety.files import read_json

Cells = Sequence[Mapping[str, Any]]
WIDTH = 100
SAME = 0.00005
DIFFERENT = ("base", "shared", "distil")
HEADING = "# What pruning costs, measured"
INTRODUCTION = """
The demo's finetunes ({names}), each calibrated on its own domain's text ({calibration} windows
unless a row says otherwise) and measured on held-out text of every domain ({windows} windows a
domain or all there are, context {context}, seed {seed}, torch {torch}, {device}). Losses are nats
per token. Own domain: mean over the finetunes. Other domains: mean over all pairs of a finetune and another domain. Controls:
base {base:.4f} on the same text; dense finetunes {home:.4f} at home, {away:.4f} away. Everything
below is the difference to the dense finetunes; empty cells were not measured. {repeated} These are
models of 4 million parameters; large ones will have gaps of another size. To run it again:
`moiety demo`, then `python -m experiments.pruning moiety-demo/recipe.yaml --held-out {windows}`
(with `--device cuda` on a GPU), then `python -m experiments.pruning_tables
experiments/pruning.json`.
"""


def own(losses: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over finetunes of the loss on their own domain."""
    return statistics.mean(losses[name][name] for name in losses)


def away(losses: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over finetunes of the loss on the other domains."""
    return statistics.mean(losses[n][other] for n in losses for other in losses if other != n)


def _paragraph(text: str, **values: object) -> str:
    filled = " ".join(text.format(**values).split())
    return textwrap.fill(filled, WIDTH, break_long_words=False, break_on_hyphens=False)


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all but the first column aligned right."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


class Page:
    """All tables of one run."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.cells: Cells = list(results["cells"].values())
        self.dense = results["controls"]["dense"]

    def gaps(self, cell: Mapping[str, Any]) -> tuple[str, str]:
        """Loss above the dense finetunes', at home and away."""
        home = own(cell["losses"]) - own(self.dense)
        return f"{home:+.4f}", f"{away(cell['losses']) - away(self.dense):+.4f}"

    def group(self, name: str) -> Cells:
        """The cells of one experiment."""
        return [cell for cell in self.cells if cell["group"] == name]

    def methods(self, sites: str) -> str:
        """Every method and pattern at one kind of site."""
        cells = [
            cell
            for cell in (*self.group("table"), *self.group("recovery"))
            if cell["settings"]["sites"] == sites
        ]
        patterns = list(dict.fromkeys(c["settings"]["pattern"] for c in cells))
        found = {(c["name"], c["settings"]["pattern"]): self.gaps(c) for c in cells}
        rows = [
            [name, *(" / ".join(found.get((name, p), ())) for p in patterns)]
            for name in dict.fromkeys(c["name"] for c in cells)
        ]
        return markdown(["method", *patterns], rows)

    def by_domain(self) -> str:
        """Own-domain losses of each finetune for 2:4 on all linear layers."""
        rows = [["dense finetune", *(f"{self.dense[d][d]:.4f}" for d in self.dense)]]
        for cell in (*self.group("table"), *self.group("recovery")):
            if cell["settings"]["sites"] == "all" and cell["settings"]["pattern"] == "2:4":
                losses = (f"{cell['losses'][d][d] - self.dense[d][d]:+.4f}" for d in self.dense)
                rows.append([cell["name"], *losses])
        return markdown(["", *self.dense], rows)

    def simple(self, group: str, first: str = "name") -> str:
        """One row a cell: gaps and bytes."""
        rows = [
            [
                cell["name"] if first == "name" else str(cell["settings"][first]),
                cell["settings"]["pattern"],
                *self.gaps(cell),
                f"{cell['bytes'] / cell['dense_bytes']:.0%}",
            ]
            for cell in self.group(group)
        ]
        return markdown(["", "pattern", "own domain", "other domains", "bytes"], rows)

    def collapse(self) -> str:
        """Own-domain loss above dense by share removed."""
        cells = self.group("collapse")
        names = list(dict.fromkeys(cell["name"] for cell in cells))
        found = {(c["settings"]["pattern"], c["name"]): self.gaps(c)[0] for c in cells}
        rows = [
            [f"{1 - float(density):.0%}", *(found.get((density, name), "") for name in names)]
            for density in dict.fromkeys(cell["settings"]["pattern"] for cell in cells)
        ]
        return markdown(["removed", *names], rows)

    def repeated(self) -> str:
        """How far results of the same settings lie apart, where some were measured again."""
        found: dict[str, list[Mapping[str, Mapping[str, float]]]] = {}
        for cell in self.cells:
            settings = {"method": "sparsegpt", "values": "bf16", "schedule": [], **cell["settings"]}
            how = [sorted(settings.items()), *(cell.get(name) or 0 for name in DIFFERENT)]
            found.setdefault(json.dumps(how), []).append(cell["losses"])
        again = [losses for losses in found.values() if len(losses) > 1]
        if not again:
            return ""
        mean = max(_spread([own(one) for one in losses]) for losses in again)
        single = max(_spread([one[d][d] for one in losses]) for losses in again for d in self.dense)
        if single < SAME:
            return f"{len(again)} settings were measured more than once, each time with one result."
        return (
            f"{len(again)} settings were measured more than once, in runs that did not round alike "
            "(another number of threads does that): results at home differ by up to "
            f"{mean:.4f}, a single finetune's by up to {single:.4f}; smaller gaps mean nothing."
        )

    def sections(self) -> Iterator[tuple[str, str, str]]:
        """Group, heading and table of everything that was measured besides the methods."""
        yield (
            "values",
            "Kept values (all linear layers, SparseGPT + refit)",
            self.simple("values"),
        )
        yield (
            "collapse",
            "Where it collapses (all linear layers, densities, own domain)",
            self.collapse(),
        )
        yield "schedule", "In one go or in rounds (all linear layers)", self.simple("schedule")
        yield (
            "task vector",
            "The weights or the task vector (bytes without the base)",
            self.simple("task vector"),
        )
        yield "shared mask", "A mask for each finetune, or one for all", self.simple("shared mask")

    def text(self) -> str:
        """The whole page."""
        base, results = self.results["controls"]["base"], self.results
        parts = [
            HEADING,
            _paragraph(
                INTRODUCTION,
                names=", ".join(self.dense),
                calibration=results["calibration_windows"],
                windows=results["held_out_windows"],
                context=results["context_length"],
                seed=results["seed"],
                torch=results["torch"],
                device=results["device"],
                base=statistics.mean(base.values()),
                home=own(self.dense),
                away=away(self.dense),
                repeated=self.repeated(),
            ),
            "## Methods (own domain / other domains)",
            f"FFN matrices only:\n\n{self.methods('ffn')}",
            f"All linear layers:\n\n{self.methods('all')}",
            "By domain, 2:4 on all linear layers, own text (first row: loss; below: difference):",
            self.by_domain(),
        ]
        for group, heading, table in self.sections():
            if self.group(group):
                parts += [f"## {heading}", table]
        return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(Page(read_json(Path(sys.argv[1]))).text())
