"""The Memory page's arithmetic: presets, what the widgets say (checked again here), and the figures of one plan."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from app.memory.presets import presets
from app.tab.requests import RequestError, recipes
from app.tab.runs import Run
from app.tab.verdict import human_bytes
from turboquant.methods import METHODS, BitsMethod, Method, parse_method
from turboquant.sizing import (
    MAX_CONFIG_BYTES,
    MOST_TOKENS,
    KVBytes,
    KVShape,
    LayerShape,
    ModelConfigError,
    SizingError,
    kv_bytes,
    largest_batch,
    longest_context,
    read_config,
    weight_bytes,
)

OWN = "own-config"
DEFAULT_MODEL = "llama-3.1-8b"
GIB = 2**30
OTHER = "other"
# Names without spaces: a widget's option stands in the address as it stands on the page.
GPUS = {
    "8GB": 8,
    "T4-16GB": 16,
    "RTX4090-24GB": 24,
    "A100-40GB": 40,
    "L40S-48GB": 48,
    "H100-80GB": 80,
    "H200-141GB": 141,
    "B200-192GB": 192,
    OTHER: None,
}


def tokens_short(tokens: int) -> str:
    """A round number of tokens in few characters; K is 1,024."""
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


BITS = (1, 2, 3, 4, 8)
SHOWN_BITS = (4, 3, 2)
WEIGHT_BITS = (16, 8, 4, 32)
CONTEXTS = {tokens_short(2**power): 2**power for power in range(8, 21)}
MAX_BATCH, MAX_GB = 4096, 10_000.0


@dataclass(frozen=True)
class Choices:
    """What the page's widgets say, named as in the URL without `mem_`."""

    model: str = DEFAULT_MODEL
    method: str = "turboquant"
    keys: int = 4
    values: int = 4
    context: str = "32K"
    batch: int = 1
    weights: int = 16
    gpu: str = "RTX4090-24GB"
    gb: float = 24.0
    reserve: float = 1.0
    growing: bool = False


@dataclass(frozen=True)
class Plan:
    """One model on one GPU with one method; everything on the page follows from it."""

    title: str
    source: str
    shape: KVShape
    method: BitsMethod
    tokens: int
    batch: int
    weight_bits: int
    gpu_bytes: int
    reserve_bytes: int
    growing: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return weight_bytes(self.shape.parameters, self.weight_bits)

    @property
    def room_bytes(self) -> int:
        """What is left for the cache; negative where the weights and the reserve do not fit."""
        return self.gpu_bytes - self.weight_bytes - self.reserve_bytes

    @property
    def options(self) -> dict[str, Any]:
        """Bytes of a value of the model (32-bit weights make 32-bit values), and what spare room counts."""
        return {"value_bytes": 4 if self.weight_bits == 32 else 2, "growing": self.growing}

    @property
    def full(self) -> Method:
        """No compression, to compare with."""
        return parse_method("full")

    def held(self, method: Method, tokens: int | None = None) -> KVBytes:
        """The cache of `tokens` tokens a row (the chosen context where none are given)."""
        return kv_bytes(self.shape, method, self.tokens if tokens is None else tokens, self.batch, **self.options)

    def longest(self, method: Method) -> int:
        """Tokens a row that fit."""
        gpu, reserve = self.gpu_bytes, self.reserve_bytes
        return longest_context(
            self.shape, method, gpu, self.weight_bytes, self.batch, reserve_bytes=reserve, **self.options
        )

    def rows(self, method: Method) -> int:
        """Rows of the chosen context that fit."""
        gpu, reserve = self.gpu_bytes, self.reserve_bytes
        return largest_batch(
            self.shape, method, gpu, self.weight_bytes, self.tokens, reserve_bytes=reserve, **self.options
        )

    def with_bits(self, bits: int) -> Method:
        """The chosen method at another number of bits for keys and values."""
        return parse_method(f"{self.method.name}:bits={bits}")

    @property
    def refusal(self) -> str | None:
        """Why there is no compressed figure, None where there is one."""
        return self.refused(self.method)

    def refused(self, method: Method) -> str | None:
        """Why a method has no figure for this model, None where it has one."""
        try:
            self.held(method, 1)
        except SizingError as error:
            return str(error)
        return None


def make_plan(choices: Choices, own: str | bytes = b"") -> Plan:
    """Check every choice; `own` is the visitor's config.json, used where the model is `OWN`.

    Raises:
        RequestError: A choice or the config.json cannot be used; one sentence says why.
    """
    _check(choices)
    if choices.model == OWN:
        if len(own) > MAX_CONFIG_BYTES:
            raise RequestError(f"A config.json has at most {MAX_CONFIG_BYTES:,} bytes, got {len(own):,}.")
        try:
            shape = read_config(own)
        except ModelConfigError as error:
            raise RequestError(str(error)) from None
        title, source = "Your model", "The config.json you gave."
    else:
        preset = presets()[choices.model]
        shape, title, source = preset.shape, preset.title, preset.source
    method = parse_method(f"{choices.method}:key_bits={choices.keys},value_bits={choices.values}")
    assert isinstance(method, BitsMethod)
    return Plan(
        title=title,
        source=source,
        shape=shape,
        method=method,
        tokens=CONTEXTS[choices.context],
        batch=choices.batch,
        weight_bits=choices.weights,
        gpu_bytes=round((GPUS[choices.gpu] or choices.gb) * GIB),
        reserve_bytes=round(choices.reserve * GIB),
        growing=choices.growing,
    )


def _check(choices: Choices) -> None:
    offered = {"model": (*presets(), OWN), "method": recipes(), "keys": BITS, "values": BITS}
    offered |= {"context": tuple(CONTEXTS), "weights": WEIGHT_BITS, "gpu": tuple(GPUS)}
    for name, allowed in offered.items():
        value = getattr(choices, name)
        if isinstance(value, bool) or value not in allowed:
            raise RequestError(f"{name} must be one of {', '.join(map(str, allowed))}, got {str(value)[:40]!r}.")
    bounds = {"batch": (1, MAX_BATCH), "gb": (1.0, MAX_GB), "reserve": (0.0, MAX_GB)}
    for name, (low, high) in bounds.items():
        value = getattr(choices, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {str(value)[:40]!r}.")


@dataclass(frozen=True)
class Measured:
    """What one side of a run really held."""

    label: str
    method: str
    tokens: int
    bytes: int
    dtype: str
    origin: str


def measured_points(plan: Plan, runs: Iterable[Run]) -> list[Measured]:
    """What runs of a model of the plan's shape really held, both sides of each; nothing for more rows than one."""
    shape, points = plan.shape, []
    if plan.batch != 1 or shape.latent:
        return []
    for run in runs:
        c = run.comparison
        model = c.model
        same = (len(shape.layers), shape.query_heads, shape.first.kv_heads, shape.first.key_dim)
        if same != (model.layers, model.query_heads, model.kv_heads, model.head_dim):
            continue
        for side in (c.original, c.compressed):
            report = side.report
            if report.tokens and (side is c.original or report.compressed_tokens):
                points.append(Measured(run.label, side.method, report.tokens, report.bytes, model.dtype, run.origin))
    return points


@dataclass(frozen=True)
class Row:
    """One method at the chosen bits and context."""

    method: str
    title: str
    held: KVBytes
    longest: int
    rows: int
    times_full: float


def alike(plan: Plan) -> list[Method]:
    """Every method at the plan's bits, the uncompressed cache first."""
    key_bits, value_bits = plan.method.resolved_bits
    return [plan.full, *(parse_method(f"{name}:key_bits={key_bits},value_bits={value_bits}") for name in recipes())]


def rows(plan: Plan) -> list[Row]:
    """The methods at the plan's bits, without those that have no figure for this model."""
    full = plan.held(plan.full).bytes
    found = []
    for method in alike(plan):
        if plan.refused(method) is None:
            held = plan.held(method)
            fits = plan.longest(method), plan.rows(method)
            found.append(Row(str(method), METHODS[method.name].title, held, *fits, full / held.bytes))
    return found


def lines(plan: Plan) -> list[tuple[str, Method]]:
    """What the charts compare: the full cache, the method at 4, 3 and 2 bits, and the chosen bits if others."""
    found = [("Full cache, 16 bits" if plan.weight_bits != 32 else "Full cache, 32 bits", plan.full)]
    if plan.refusal is not None:
        return found
    chosen = plan.method
    found += [(f"{chosen.name}, {bits} bits", plan.with_bits(bits)) for bits in SHOWN_BITS]
    if chosen not in [method for _, method in found]:
        key_bits, value_bits = chosen.resolved_bits
        found.append((f"chosen: keys {key_bits}, values {value_bits} bits", chosen))
    return found


def grid(plan: Plan, measured: Iterable[Measured] = ()) -> list[int]:
    """Contexts to draw, four an octave: from below what is measured to beyond what fits, within reason."""
    fits = [tokens for _, method in lines(plan) if (tokens := plan.longest(method)) < 2**24]
    low = min([256, *(max(16, point.tokens // 2) for point in measured)])
    high = min(2**25, max(131_072, 2 * plan.tokens, plan.shape.max_positions or 0, *(2 * tokens for tokens in fits)))
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return sorted({round(2 ** (step / 4)) for step in range(4 * first, 4 * last + 1)})


def tokens_text(tokens: int) -> str:
    """A number of tokens, or the words for one that nothing limits."""
    return "no limit" if tokens >= MOST_TOKENS else f"{tokens:,}"


def kinds_text(shape: KVShape) -> str:
    """Which layers keep what, in one sentence."""
    kept = [f"{count} {_keeps(layer, shape.latent)}" for layer, count in _groups(shape)]
    states = [layer for layer in shape.layers if layer.recurrent]
    if alone := [layer for layer in states if layer.keeps == "none"]:
        kept.append(f"{len(alone)} are recurrent and keep no tokens")
    if rest := len(shape.layers) - len(alone) - sum(count for _, count in _groups(shape)):
        kept.append(f"{rest} keep nothing of their own")
    size = human_bytes(sum(2 * layer.state_values + layer.state_bytes for layer in states))
    held = f"; recurrent states take {size} a row, however long it is" if states else ""
    count, said = len(shape.layers), "; ".join(kept)
    layers = f"All {count} layers {said.partition(' ')[2]}" if len(kept) == 1 else f"Of {count} layers {said}"
    return f"{layers}{held}. {shape.query_heads} query heads."


def _groups(shape: KVShape) -> list[tuple[LayerShape, int]]:
    """The layers that keep tokens, alike ones together, with their number; those that keep all come first."""
    return list(Counter([*shape.keeping("all"), *shape.keeping("window")]).items())


def _keeps(layer: LayerShape, latent: bool) -> str:
    """What a layer keeps of its tokens."""
    tokens = "every token" if layer.keeps == "all" else f"the last {layer.window:,}, which stay at 16 bits"
    both = f"head_dim {layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim} + {layer.value_dim}"
    what = f"{_heads(layer.kv_heads)}, {both}"
    if latent:
        what = f"one joint latent of {layer.key_dim} numbers and a rotary part of {layer.value_dim}, whatever the heads"
    beside = f", and {layer.beside} numbers of an indexer" if layer.beside else ""
    return f"keep {tokens} ({what}{beside})"


def _heads(count: int) -> str:
    return f"{count} KV head{'s' if count > 1 else ''}"


def sums(plan: Plan) -> list[str]:
    """The figures at the chosen context as sums with their numbers, one line a part."""
    shape, size = plan.shape, plan.options["value_bytes"]
    rows = f" x {plan.batch:,} rows" if plan.batch > 1 else ""
    full = plan.held(plan.full)
    found = [f"full cache = {human_bytes(full.bytes)}"]
    for layer, count in _groups(shape):
        tokens = min(plan.tokens, layer.window or plan.tokens)
        heads = "" if shape.latent else f"{_heads(layer.kv_heads)} x "
        beside = f" + {layer.beside}" if layer.beside else ""
        numbers = f"{heads}({layer.key_dim} + {layer.value_dim}{beside}) numbers x {size} bytes"
        total = human_bytes(count * layer.token_values * size * tokens * plan.batch)
        kind = "sliding" if layer.keeps == "window" else "full"
        found.append(f"  {count} {kind} layers x {numbers} x {tokens:,} tokens{rows} = {total}")
    if full.state_bytes:
        found.append(f"  recurrent states{rows} = {human_bytes(full.state_bytes)}")
    return found if plan.refusal is not None else [*found, *_packed_sums(plan, rows)]


def _packed_sums(plan: Plan, rows: str) -> list[str]:
    shape, held = plan.shape, plan.held(plan.method)
    packed = [(layer, count) for layer, count in _groups(shape) if layer.packed]
    heads = " + ".join(f"{count} layers x {_heads(layer.kv_heads)}" for layer, count in packed)
    heads = f"({heads})" if len(packed) > 1 else heads
    vectors = sum(count * layer.kv_heads for layer, count in packed) * plan.batch * held.compressed_tokens
    found = [f"{plan.method} = {human_bytes(held.bytes)}, {held.bits_per_value:.2f} bits a value"]
    for words, part in (
        ("codes of keys", held.key_bytes),
        ("codes of values", held.value_bytes),
        ("scales and means", held.scale_bytes),
    ):
        if vectors:
            each = f"{held.compressed_tokens:,} packed tokens x {part / vectors:.4g} bytes{rows}"
            found.append(f"  {words}: {heads} x {each} = {human_bytes(part)}")
    windows = len(shape.keeping("window"))
    window = f" and the windows of {windows} sliding layers" if windows else ""
    spare, tables = human_bytes(held.spare_bytes), human_bytes(held.shared_bytes)
    found.append(f"  exact: {plan.tokens - held.compressed_tokens:,} tokens{window} = {human_bytes(held.exact_bytes)}")
    found.append(f"  spare room = {spare}, tables shared by all rows = {tables}")
    return [*found, f"  recurrent states{rows} = {human_bytes(held.state_bytes)}"] if held.state_bytes else found
