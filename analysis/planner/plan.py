"""What a model takes on a card: weights, cache, activations, overhead; and what would fit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from moiety.analysis.planner.cards import Card, find_card
from moiety.analysis.planner.formats import FORMATS, Format
from moiety.analysis.planner.inventory import Inventory, Part
from moiety.analysis.planner.memory import activation_bytes, cache_bytes
from moiety.analysis.planner.sources import take_stock
from moiety.errors import InputError
from moiety.units import parse_size

OVERHEAD = "0.75GB"
CHUNK = 2048
LONGEST = 2**24
MOST_EXPERTS = 4096
AS_STORED = "as it is"


@dataclass(frozen=True, kw_only=True)
class Use:
    """The memory and speed of one way to hold the weights.

    `longest` is the longest context that fits (0: none; at most the model's own), `most_experts`
    how many experts of this size do, `tokens_per_second` the bound that bandwidth sets on
    decoding all sequences together. What is not known is None.
    """

    name: str
    weights: int
    cache: int
    activations: int
    overhead: int
    read: float
    fits: bool | None = None
    longest: int | None = None
    most_experts: int | None = None
    tokens_per_second: float | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.overhead


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """A model on a card: as it is first, then its matrices in other formats.

    `limit` is the longest context that the model itself was made for, if it says so.
    """

    model: str
    card: Card | None
    context: int
    batch: int
    cache_dtype: str
    limit: int | None
    experts: int
    active: int
    parts: tuple[Part, ...]
    uses: tuple[Use, ...]

    @property
    def use(self) -> Use:
        """The model as it is."""
        return self.uses[0]

    def _repr_html_(self) -> str:
        from moiety.analysis.planner.tables import plan_tables

        return "".join(table._repr_html_() for table in plan_tables(cast(Any, self)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with totals."""
        values = asdict(self)
        for written, use in zip(values["uses"], self.uses, strict=True):
            written["total"] = use.total
        return values


@dataclass(frozen=True, kw_only=True)
class _Setting:
    inventory: Inventory
    card: Card | None
    context: int
    batch: int
    cache: str
    chunk: int
    overhead: int

    @property
    def limit(self) -> int | None:
        return getattr(self.inventory.config, "max_position_embeddings", None)

    def cache_at(self, context: int) -> int:
        stock = self.inventory
        return stock.caches * cache_bytes(stock.config, context, self.batch, self.cache)

    def activations_at(self, context: int) -> int:
        config = self.inventory.config
        tokens = min(context, self.chunk)
        return activation_bytes(config, tokens, context, self.batch, self._word)

    @property
    def _word(self) -> int:
        kinds = {item.kind for item in self.inventory.items}
        return 4 if kinds <= {"dense fp32", "gates"} else 2

    def fits(self, form: Format | None, context: int, experts: int | None = None) -> bool:
        assert self.card is not None
        held = self.inventory.bytes_in(form, experts) + self.overhead
        return held + self.cache_at(context) + self.activations_at(context) <= self.card.memory


def plan(
    source: str | Path,
    *,
    gpu: str | None = None,
    bandwidth: str | None = None,
    context: int = 4096,
    batch: int = 1,
    cache: str = "bf16",
    chunk: int = CHUNK,
    overhead: str = OVERHEAD,
) -> MemoryPlan:
    """Plan a model folder, its `config.json`, a hub id or a recipe; no weights are loaded.

    `gpu` is a size (`16GB`) or a card's name, `bandwidth` overrides the card's. `chunk` is how many
    tokens of a prompt are processed at once, `overhead` what the device and its libraries take
    before any model. Bytes of weights and cache follow from shapes; activations, overhead and
    speed are estimates. Raises InputError for a model or a quantity that cannot be read.
    """
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, but it is {value}")
    if bandwidth is not None and gpu is None:
        raise InputError("expected gpu with bandwidth; name the card or its memory")
    setting = _Setting(
        inventory=take_stock(source),
        card=None if gpu is None else find_card(gpu, bandwidth),
        context=context,
        batch=batch,
        cache=cache,
        chunk=chunk,
        overhead=parse_size(overhead, "overhead"),
    )
    stock = setting.inventory
    return MemoryPlan(
        model=str(source),
        card=setting.card,
        context=context,
        batch=batch,
        cache_dtype=cache,
        limit=setting.limit,
        experts=stock.experts,
        active=stock.active,
        parts=stock.parts(),
        uses=tuple(_use(setting, form) for form in (None, *_others(stock))),
    )


def _others(stock: Inventory) -> list[Format]:
    """The formats that the matrices are not in already."""
    kinds = {item.kind for item in stock.items if item.matrix}
    return [form for form in FORMATS if kinds != {form.name}]


def _use(setting: _Setting, form: Format | None) -> Use:
    stock, card = setting.inventory, setting.card
    read = stock.bytes_read(form, setting.batch) + setting.cache_at(setting.context)
    speed = card.bandwidth if card is not None else None
    return Use(
        name=AS_STORED if form is None else form.name,
        weights=stock.bytes_in(form),
        cache=setting.cache_at(setting.context),
        activations=setting.activations_at(setting.context),
        overhead=setting.overhead,
        read=read,
        fits=None if card is None else setting.fits(form, setting.context),
        longest=None if card is None else _longest(setting, form),
        most_experts=_most_experts(setting, form),
        tokens_per_second=None if speed is None else setting.batch * speed / read,
    )


def _longest(setting: _Setting, form: Format | None) -> int:
    return _largest(lambda context: setting.fits(form, context), setting.limit or LONGEST)


def _most_experts(setting: _Setting, form: Format | None) -> int | None:
    stock = setting.inventory
    if setting.card is None or not stock.experts or stock.caches > 1:
        return None
    return _largest(lambda count: setting.fits(form, setting.context, count), MOST_EXPERTS)


def _largest(fits: Callable[[int], bool], ceiling: int) -> int:
    """The largest number up to `ceiling` that fits; 0 when even 1 does not."""
    low, high = 0, ceiling
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
