"""The whole pipeline on text that every machine has: the same functions that users call."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety.analysis import Trace, report, summarise, trace
from moiety.analysis.controls import evaluate_build, evaluate_routes
from moiety.analysis.evaluate import continue_greedily
from moiety.analysis.samples import read_samples, samples_to_rich
from moiety.analysis.statistics import RoutingSummary
from moiety.analysis.tables import controls_table, resources_table, routing_table
from moiety.compose import BuildReport, Recipe, build, open_composite
from moiety.compose.kinds import builder_of
from moiety.compose.recipe import Domain, Evaluate, Expert, Mixture, Route, Routed
from moiety.compose.routing import RoutingBuilder
from moiety.compose.stages import Stages
from moiety.demo.models import FULL, QUICK, DemoModels, DemoSize, prepare
from moiety.errors import OutputError
from moiety.experts.checkpoint import digest_of_model
from moiety.files import (
    check_new_folder,
    read_json,
    write_json,
    write_text,
)
from moiety.progress import SILENT, Progress
from moiety.text import read_documents
from moiety.version import __version__

MARK = "demo.json"
PROMPT_CHARACTERS = 160
SAMPLE_TOKENS = 40


def run(
    out: str | Path,
    *,
    quick: bool = False,
    fresh: bool = False,
    cache: Path | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[dict[str, Any], list[Any]]:
    """Run the demo into folder `out`; gives the results and what shows them on a terminal.

    Writes `recipe.yaml`, `composite/`, `trace/`, `report.html` and `results.json`. An interrupted
    run goes on from its last finished stage; a finished one is shown again. Raises OutputError
    when `out` holds anything else.
    """
    out = Path(out).absolute()
    size = QUICK if quick else FULL
    _claim(out, {"version": __version__, "size": size.name, "seed": seed})
    demo = Demo(out, size, seed, progress)
    if (out / "results.json").is_file():
        progress.note(f"{out} already holds this demo; remove it to run it again")
    else:
        demo.run(fresh=fresh, cache=cache)
    results = read_json(out / "results.json")
    return results, shown(results, summarise(Trace.open(out / "trace")))


def shown(results: dict[str, Any], summary: RoutingSummary) -> list[Any]:
    """The tables and samples of the report, for a terminal."""
    measures = ("loss", "bits_per_byte", "accuracy")
    controls = [controls_table(results, measure) for measure in measures]
    tables = [*controls, resources_table(results), routing_table(summary)]
    return [*(table.to_rich() for table in tables), samples_to_rich(read_samples(results))]


def _claim(out: Path, mark: dict[str, Any]) -> None:
    """Make `out` ours, or find that it is ours already, or refuse."""
    if not (out / MARK).is_file():
        check_new_folder(out)
        out.mkdir(exist_ok=True)
        write_json(out / MARK, mark)
        return
    found = read_json(out / MARK)
    if found != mark:
        raise OutputError(
            f"expected {out} to be absent or to hold the demo of {mark}, but it holds that of "
            f"{found}; choose another --out or remove the folder"
        )


@dataclass(frozen=True)
class Budget:
    """Windows of calibration and held-out text a domain, and steps of gate training."""

    calibration: int
    heldout: int
    route_steps: int


BUDGETS = {FULL.name: Budget(128, 64, 40), QUICK.name: Budget(128, 24, 10)}


class Demo:
    """One run: where it writes, how large it is, and how long each stage took."""

    def __init__(self, out: Path, size: DemoSize, seed: int, progress: Progress) -> None:
        self.out = out
        self.size = size
        self.seed = seed
        self.progress = progress
        self.stages = Stages(out / "stages", progress)
        self.seconds: dict[str, float] = {}

    def run(self, *, fresh: bool, cache: Path | None) -> None:
        """Every stage in order; `results.json` is written last."""
        with self._timed("models"):
            models = prepare(
                self.size, seed=self.seed, cache=cache, fresh=fresh, progress=self.progress
            )
        recipes = make_recipes(self.size, models, self.seed)
        losses = {kind: self._held_back_loss(recipe) for kind, recipe in recipes.items()}
        shipped = min(losses, key=lambda kind: losses[kind])
        [other] = set(recipes) - {shipped}
        recipe, work = recipes[shipped], self.stages.folder
        write_text(self.out / "recipe.yaml", recipe.to_yaml())
        built = build(recipe, self.out / "composite", work=work, progress=self.progress)
        self.progress.note(
            f"the {shipped} model is shipped: {losses[shipped]:.4f} nats per token of held-back "
            f"calibration text against {losses[other]:.4f}; trainable parameters: "
            f"{built.facts['gate_parameters']:,}, exactly the gates'"
        )
        results = evaluate_build(recipe, built.composite, work, self.progress)
        self._compare(results, recipes[other], other)
        results["choices"] |= {"kind": shipped, "held_back_loss": losses}
        self._trace(recipe, built)
        results["samples"] = self._samples(recipe, built)
        self._explain(results, built)

    def _held_back_loss(self, recipe: Recipe) -> float:
        """What a kind's trained gates reach on calibration documents that none was fitted to."""
        builder = builder_of(recipe, self.stages, self.progress)
        assert isinstance(builder, RoutingBuilder)
        return read_json(builder.routed / "route.json")["training"]["best_loss"]

    def _compare(self, results: dict[str, Any], recipe: Recipe, kind: str) -> None:
        """Add the rows of the kind that is not shipped."""
        built = build(recipe, self.out / kind, work=self.stages.folder, progress=self.progress)
        rows = evaluate_routes(recipe, built.composite, self.stages.folder, self.progress)
        for measure in ("loss", "bits_per_byte"):
            results[measure][kind] = rows[measure]["composite"]
            results[measure][f"{kind}_oracle"] = rows[measure]["oracle"]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _trace(self, recipe: Recipe, built: BuildReport) -> None:
        if (self.out / "trace").is_dir():
            self.progress.note("trace: already done, used again")
            return
        texts = {e.name: e.domain.heldout for e in recipe.experts if e.domain.heldout}
        with self._timed("trace"):
            trace(
                built.composite,
                texts,
                self.out / "trace",
                context_length=recipe.context_length,
                windows=recipe.evaluate.windows,
                progress=self.progress,
            )

    def _samples(self, recipe: Recipe, built: BuildReport) -> dict[str, Any]:
        """What the composite writes after the beginning of a held-out document of each domain."""

        def make(scratch: Path) -> None:
            composite = open_composite(built.composite)
            samples = {}
            for expert in recipe.experts:
                own = expert.domain
                documents = read_documents(own.heldout) if own.heldout else own.documents()
                text = documents[0]
                prompt = text[:PROMPT_CHARACTERS].rsplit("\n", 1)[0] + "\n"
                [written] = continue_greedily(
                    composite.model, composite.tokenizer, [prompt], SAMPLE_TOKENS
                )
                samples[expert.name] = {"prompt": prompt, "continuation": written}
            write_json(scratch / "samples.json", samples)

        return read_json(self._stage("samples", built, make) / "samples.json")

    def _stage(self, name: str, built: BuildReport, make: Callable[[Path], None]) -> Path:
        return self.stages.run(name, {"composite": digest_of_model(built.composite)}, make)

    def _explain(self, results: dict[str, Any], built: BuildReport) -> None:
        summary = summarise(Trace.open(self.out / "trace"))
        results["routing"] = {
            "normalized_mutual_information": summary.normalized_mutual_information,
            "own_domain_share": summary.own_domain_share,
        }
        results["seconds"] = {
            **self.seconds,
            **built.seconds,
            **results["seconds"],
            **self.stages.seconds,
        }
        report(self.out / "trace", self.out / "report.html", results)
        write_json(self.out / "results.json", results)


def make_recipes(size: DemoSize, models: DemoModels, seed: int) -> dict[str, Recipe]:
    """The recipes, by kind, that `moiety build` reproduces the demo's composites from."""
    budget = BUDGETS[size.name]
    experts = [
        Expert(
            name=name,
            model=str(folder),
            domain=Domain(
                calibration=str(models.corpora / name / "calibration.jsonl"),
                heldout=str(models.corpora / name / "heldout.jsonl"),
            ),
        )
        for name, folder in models.finetunes.items()
    ]
    problems = {"arithmetic": str(models.corpora / "arithmetic" / "problems.jsonl")}
    kinds = {"mixture": Mixture(), "routed": Routed(norms="routed")}
    return {
        name: Recipe(
            base=str(models.base),
            experts=experts,
            context_length=size.context_length,
            calibration_windows=budget.calibration,
            seed=seed,
            compose=kind,
            route=Route(train_steps=budget.route_steps),
            evaluate=Evaluate(windows=budget.heldout, problems=problems),
        )
        for name, kind in kinds.items()
    }
