"""`python -m benchmarks.assisted TARGET DRAFT... [--data NAME=FILE] [--json FILE]`: a cheap draft.

A sparse merge (or any other model of the same vocabulary) writes a few tokens ahead, the target
checks them all in one pass (assisted generation of transformers, greedy, batch 1): the text is the
target's own, and the speed hangs on how many drafted tokens it accepts. Plain and assisted
generation take turns in one process. Prompts are the beginnings of held-out documents: those of the
recipe that a composite holds, or of `--data`.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging

from benchmarks import tables
from moiety.compose import Recipe
from moiety.compose.composite import Composite
from moiety.compose.opening import open_any
from moiety.errors import InputError
from moiety.text import read_documents

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, DRAFTED = 4, 64, 64, "3,6"
QUICK = {"prompts": 1, "prompt_tokens": 16, "new_tokens": 8}
COLUMNS = ("case", "drafted", "plain s / assisted s", "accepted", "tokens a pass", "equal")


@dataclass
class Drafts:
    """Tokens that a draft proposed, those of them that the target accepted, and its passes."""

    proposed: int = 0
    accepted: int = 0
    passes: int = 0

    def share(self) -> float:
        """Accepted tokens of those proposed."""
        return self.accepted / max(1, self.proposed)


@contextlib.contextmanager
def counted(target: Any, drafts: Drafts) -> Iterator[None]:
    """Count what is drafted for `target` inside the block.

    transformers tells nobody, so the generator of candidates is listened to.
    """
    make = target._get_candidate_generator

    def listened(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        propose, judge = generator.get_candidates, generator.update_candidate_strategy

        def get_candidates(ids_1S: Tensor, **more: Any) -> Any:
            found = propose(ids_1S, **more)
            drafts.proposed += found[0].shape[1] - ids_1S.shape[1]
            drafts.passes += 1
            return found

        def update_candidate_strategy(ids_1S: Tensor, scores: Tensor, matches: Any) -> None:
            drafts.accepted += int(matches)
            judge(ids_1S, scores, matches)

        generator.get_candidates = get_candidates
        generator.update_candidate_strategy = update_candidate_strategy
        return generator

    target._get_candidate_generator = listened
    try:
        yield
    finally:
        del target._get_candidate_generator


def prompts(
    target: Composite, texts: Mapping[str, str | Path], count: int, tokens: int
) -> dict[str, list[Tensor]]:
    """The first tokens (1, S) of documents of each text; InputError when none is long enough."""
    found: dict[str, list[Tensor]] = {}
    for name, text in texts.items():
        each = (target.tokenizer(document)["input_ids"] for document in read_documents(text))
        found[name] = [torch.tensor([ids[:tokens]]) for ids in each if len(ids) >= tokens][:count]
        if not found[name]:
            raise InputError(
                f"expected a document of {tokens} tokens in {text}, but all are shorter; "
                "give longer text or fewer --prompt-tokens"
            )
    return found


def measured(
    target: Any, draft: Any, prompts_of: Sequence[Tensor], drafted: int, new_tokens: int
) -> dict[str, Any]:
    """Seconds of plain and assisted generation in turns, what was drafted, and whether equal."""
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    config = draft.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafted, "constant"
    config.assistant_confidence_threshold = 0.0
    seconds, drafts, equal = [0.0, 0.0], Drafts(), 0
    for turn, ids_1S in enumerate((prompts_of[0], *prompts_of)):
        mask_1S, written = torch.ones_like(ids_1S), []
        used = drafts if turn else Drafts()
        for assisted in (False, True):
            helper = {"assistant_model": draft} if assisted else {}
            start = time.perf_counter()
            with counted(target, used):
                out = target.generate(ids_1S, attention_mask=mask_1S, **settings, **helper)
            seconds[assisted] += (time.perf_counter() - start) * bool(turn)
            written.append(out)
        equal += torch.equal(*written) and bool(turn)
    tokens = len(prompts_of) * new_tokens
    return {
        "tokens": tokens,
        "drafted": drafted,
        "seconds": seconds[1],
        "ratio": {"plain": seconds[0] / seconds[1]},
        "tokens_per_second": {"plain": tokens / seconds[0], "assisted": tokens / seconds[1]},
        "proposed": drafts.proposed,
        "accepted": drafts.accepted,
        "passes": drafts.passes,
        "acceptance": drafts.share(),
        "tokens_a_pass": tokens / drafts.passes,
        "equal": equal / len(prompts_of),
    }


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """One line a domain, draft and number of drafted tokens: the ratio first."""
    table = Table(title=f"{title} ({tables.device()})", title_justify="left")
    for name in (*COLUMNS, "plain tokens/s", "assisted tokens/s"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(
            row["case"],
            str(row["drafted"]),
            f"{row['ratio']['plain']:.2f}",
            f"{row['acceptance']:.0%}",
            f"{row['tokens_a_pass']:.2f}",
            f"{row['equal']:.0%}",
            *(f"{row['tokens_per_second'][name]:.1f}" for name in ("plain", "assisted")),
        )
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


def texts_of(target: Path, data: Sequence[str]) -> dict[str, str | Path]:
    """Held-out text by domain: what `--data` names, or what the composite's recipe does."""
    if data:
        pairs = [entry.partition("=") for entry in data]
        wrong = [entry for entry, (_, _, path) in zip(data, pairs, strict=True) if not path]
        if wrong:
            raise InputError(f"expected --data NAME=FILE, but it is {wrong[0]}")
        return {name: path for name, _, path in pairs}
    if not (target / "recipe.yaml").is_file():
        raise InputError(f"expected --data NAME=FILE, because {target} holds no recipe.yaml")
    experts = Recipe.read(target / "recipe.yaml").experts
    return {one.name: one.domain.heldout for one in experts if one.domain.heldout is not None}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every draft on every domain, with every number of drafted tokens."""
    target = open_any(arguments.target)
    texts = texts_of(arguments.target, arguments.data)
    prompts_of = prompts(target, texts, arguments.prompts, arguments.prompt_tokens)
    rows = []
    for folder in arguments.drafts:
        draft = open_any(folder).model
        for name, own in prompts_of.items():
            for drafted in map(int, arguments.drafted.split(",")):
                row = measured(target.model, draft, own, drafted, arguments.new_tokens)
                rows.append({"case": f"{name}: {folder.name}", "target": {}, **row})
    return rows


def main() -> None:
    """Run all, print the table, write the JSON if asked."""
    parser = tables.parser("assisted", __doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("drafts", type=Path, nargs="+", metavar="draft")
    parser.add_argument("--data", action="append", default=[], help="NAME=FILE, repeatable")
    parser.add_argument("--drafted", default=DRAFTED, help="tokens drafted at a time")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts a domain")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    logging.disable_progress_bar()
    rows = run(arguments)
    lengths = f"{arguments.prompt_tokens} prompt tokens, {arguments.new_tokens} new ones"
    show(rows, f"{arguments.target.name} with a draft, batch 1, {lengths}")
    tables.write(rows, arguments.json)


if __name__ == "__main__":
    main()
