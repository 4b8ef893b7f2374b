"""`python -m benchmarks.trace [--json FILE]`: what recording routes adds to a plain forward pass.

A random Qwen3-MoE of about 100 M parameters reads windows of text three ways, interleaved: its plain
forward pass with the loss, as any evaluation does; the same with routes recorded; and what the
trace costs with Parquet written. Targets: at most 10 % more than the plain pass.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.tables import device, parser, write
from benchmarks.timing import interleaved
from moiety.analysis.trace import trace_model
from moiety.scoring import token_losses
from moiety.text import Windows

MOST = 0.10
CONTEXT, WINDOWS, BATCH = 256, 24, 8
VOCABULARY = 8192


class Letters:
    """A tokenizer whose every token is one letter: decoding costs what it must and no more."""

    bos_token_id = pad_token_id = eos_token_id = None

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: list[int], **_: Any) -> str:
        """A letter a token."""
        return "".join(chr(97 + token % 26) for token in ids)


def model(layers: int) -> Qwen3MoeForCausalLM:
    """Random weights; the width of a small MoE."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config).eval()


def main() -> None:
    """Time both, print and write the ratio."""
    made = parser("trace", __doc__)
    arguments = made.parse_args()
    windows, layers = (2, 2) if arguments.quick else (WINDOWS, 8)
    network = model(layers)
    ids_WC = torch.randint(0, VOCABULARY, (windows, CONTEXT))
    text = Windows(
        ids_WC=ids_WC,
        mask_WC=torch.ones_like(ids_WC),
        document_W=torch.arange(windows),
        bytes_W=torch.full((windows,), CONTEXT),
    )
    with tempfile.TemporaryDirectory() as folder:
        names = itertools.count()

        @torch.no_grad()
        def plain() -> None:
            for batch in text.batches(BATCH):
                output = network(
                    input_ids=batch.ids_WC, attention_mask=batch.mask_WC, use_cache=False
                )
                token_losses(output.logits, batch.ids_WC, batch.mask_WC)

        @torch.no_grad()
        def without_loss() -> None:
            for batch in text.batches(BATCH):
                network(input_ids=batch.ids_WC, attention_mask=batch.mask_WC, use_cache=False)

        def traced() -> None:
            out = Path(folder) / str(next(names))
            trace_model(network, Letters(), {"text": text}, out, batch_size=BATCH)  # pyright: ignore[reportArgumentType]

        contenders = {"forward": without_loss, "forward and loss": plain, "trace": traced}
        seconds = interleaved(contenders, rounds=7, warm_up=1, budget=80)
    over = {name: seconds["trace"] / seconds[name] - 1 for name in ("forward", "forward and loss")}
    row = {
        "tokens": windows * CONTEXT,
        "layers": layers,
        "seconds": seconds,
        "overhead": over,
        "target": {"overhead of the plain forward pass": MOST},
    }
    met = "met" if over["forward"] <= MOST else "missed"
    Console().print(
        f"{windows * CONTEXT:,} tokens, {layers} layers: a trace takes {over['forward']:+.1%} of the "
        f"plain forward pass, {over['forward and loss']:+.1%} of it with the loss ({device()}); "
        f"target at most {MOST:.0%} {met}",
        highlight=False,
    )
    write([row], arguments.json)


if __name__ == "__main__":
    main()
