"""How large the demo is: every setting that influences its models."""

from dataclasses import dataclass

DOMAINS = ("python", "cpp", "english", "arithmetic")


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """All settings of a demo; two equal sizes with one seed give the same bytes.

    `*_tokens` are the approximate tokens of a split of one domain, `document_characters` the
    most that one document holds, `problems` the exact-match prompts. `rows` windows of
    `context_length` tokens make a training step; `matrix_rate` is the peak learning rate of the
    hidden matrices, `vector_rate` that of embeddings and norms. A finetune starts at
    `finetune_share` of the base's matrix rate.
    """

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    context_length: int
    train_tokens: int
    calibration_tokens: int
    heldout_tokens: int
    document_characters: int
    problems: int
    rows: int
    base_steps: int
    finetune_steps: int
    matrix_rate: float
    vector_rate: float
    finetune_share: float


FULL = DemoSize(
    name="full",
    vocabulary=4096,
    hidden=256,
    intermediate=512,
    layers=4,
    heads=4,
    context_length=256,
    train_tokens=280_000,
    calibration_tokens=62_000,
    heldout_tokens=46_000,
    document_characters=16_000,
    problems=180,
    rows=8,
    base_steps=250,
    finetune_steps=50,
    matrix_rate=0.012,
    vector_rate=0.012,
    finetune_share=0.15,
)

QUICK = DemoSize(
    name="quick",
    vocabulary=2048,
    hidden=128,
    intermediate=256,
    layers=4,
    heads=4,
    context_length=128,
    train_tokens=80_000,
    calibration_tokens=16_000,
    heldout_tokens=12_000,
    document_characters=8_000,
    problems=100,
    rows=8,
    base_steps=150,
    finetune_steps=35,
    matrix_rate=0.012,
    vector_rate=0.012,
    finetune_share=0.25,
)
