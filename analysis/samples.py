"""What a composite wrote after a prompt of each domain, for a terminal and a browser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from moiety.analysis.tables import section
from moiety.analysis.visible import visible, visible_line
from moiety.errors import InputError


@dataclass(frozen=True)
class Sample:
    """A prompt of one domain and its continuation, with nothing in them that steers a display."""

    domain: str
    prompt: str
    continuation: str


def read_samples(results: Mapping[str, Any]) -> list[Sample]:
    """The samples of `results`, none when absent; InputError when one is not text."""
    samples = []
    for domain, sample in section(results, "samples").items():
        texts = [sample.get(part) for part in ("prompt", "continuation")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"results: samples.{domain} must have prompt and continuation texts")
        samples.append(Sample(visible_line(domain), *(visible(text) for text in texts)))
    return samples


def samples_to_rich(samples: list[Sample]) -> Group:
    """For a terminal: prompts dim, continuations bold."""
    parts: list[Any] = [Text("What the composite writes (greedy)", style="italic")]
    for sample in samples:
        written = Text.assemble((sample.prompt, "dim"), (sample.continuation.rstrip(), "bold"))
        parts += [Text(sample.domain), Padding(written, (0, 0, 1, 4))]
    return Group(*parts)
