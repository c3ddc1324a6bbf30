"""The smallest cache that keeps a model's predictions on a text within limits, with the evidence.

Candidates are recipes with all pairs of key and value bits. They are compared by the bytes that their caches hold at a
context of the caller's (the sum of `turboquant.sizing`) and measured by the perplexity experiment on one part of the
text; the smallest that passes must pass on another part too. Then bits are taken from the layers that stand it best.
Every measurement is an ordinary record of the experiment `perplexity`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from math import ceil, inf, log2
from typing import Any

from turboquant.experiments.base import Models, Watch, cells_for, run_group
from turboquant.experiments.perplexity import EXPERIMENT, FullRun, read_full
from turboquant.experiments.perplexity import run as run_perplexity
from turboquant.experiments.recommendation import MOST_TOKENS, Memory, Part, Recommendation, RecommendSettings, Tried
from turboquant.methods import Method, parse_method
from turboquant.methods.layer_bits import Bits, write_layer_bits
from turboquant.models.inputs import Reusable, reusable
from turboquant.models.load import LoadedModel
from turboquant.records.environment import environment
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.settings import PerplexitySettings
from turboquant.run.compare import model_info
from turboquant.run.generate import CancelledError, PromptError
from turboquant.sizing import KVBytes, SizingError, kv_bytes, read_config
from turboquant.texts import read_text, reading

BITS = (2, 3, 4, 5, 6, 8)
MOST_APART = 2
"""Steps of `BITS` between keys and values at most."""
LAYER_TOKENS = 128
"""Tokens of a window on which a single layer is measured."""
TYPED = "typed in"
"""Name of a text that came as such and not by a name."""


@dataclass(frozen=True)
class Candidate:
    """A method that may be chosen.

    Attributes:
        method: As `parse_method` reads it.
        family: Candidates of one family differ in bits alone.
        bits: Of keys and of values.
        size: Bytes its cache holds where sizes are compared.
    """

    method: str
    family: str
    bits: tuple[int, int]
    size: int

    def within(self, other: "Candidate") -> bool:
        """Is it of the same family, with no more bits a key and no more a value? Where the other fails, it does too."""
        return self.family == other.family and all(a <= b for a, b in zip(self.bits, other.bits, strict=True))


def smallest(
    candidates: Iterable[Candidate],
    choose: Callable[[Candidate], bool],
    confirm: Callable[[Candidate], bool] = lambda candidate: True,
) -> Candidate | None:
    """Return the smallest candidate that passes both tests, or None.

    The one in the middle is tried: where it passes, only smaller ones are still of interest; where it fails, so do
    those `within` it. What is left at the end is confirmed; where that fails, the search goes on among larger ones.
    `choose` may be asked about a candidate twice.
    """
    left = sorted(candidates, key=lambda one: (one.size, one.method))
    best: Candidate | None = None
    while True:
        below = left if best is None else [one for one in left if one.size < best.size]
        if below:
            tried = below[len(below) // 2]
            if choose(tried):
                best = tried
                continue
        elif best is None or confirm(best):
            return best
        else:
            tried, best = best, None
        left = [one for one in left if not one.within(tried)]


def most(count: int, passes: Callable[[int], bool]) -> int:
    """Return the greatest number from 1 to `count` that passes, or 0; if one passes, all below it are taken to pass."""
    low, high = 0, count + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def recommend(
    loaded: LoadedModel,
    settings: RecommendSettings | None = None,
    watch: Watch | None = None,
    *,
    text: str | None = None,
    known: Iterable[ExperimentRecord] = (),
    keep: Callable[[ExperimentRecord], None] = lambda record: None,
) -> Recommendation:
    """Find the smallest cache within the limits.

    Args:
        loaded: The model.
        settings: Texts, limits and candidates.
        watch: Progress (the number of steps is estimated), cancelling, and stopping between two measurements.
        text: A text itself, in place of `settings.texts`.
        known: Records from before; what they say of the same model and text is not measured again.
        keep: Called with each new record.

    Raises:
        PromptError: A text or the context is too short, or longer than the model's; names the rule and the value.
        ValueError: A text cannot be read, or the model's cache cannot be sized or is not compressed (`SizingError`).
        CancelledError: The caller asked to cancel or to stop; what was kept can be given as `known` again.
    """
    asked, watch = settings or RecommendSettings(), watch or Watch()
    return _Search(loaded, asked, watch, text, known, keep).run()


def reusable_for(loaded: LoadedModel, texts: Sequence[str], known: Iterable[ExperimentRecord]) -> Reusable:
    """Find the records that a search on these texts can use."""
    records = list(known)
    cells = [one.cell for one in records if one.cell.settings.get("texts") == list(texts)]
    cells = [one for one in cells if (one.model, one.weights) == (loaded.spec.name, loaded.weights)]
    return reusable(records, cells, model=lambda name: loaded.fingerprint)


class _Search:
    """One run of `recommend`."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: RecommendSettings,
        watch: Watch,
        text: str | None,
        known: Iterable[ExperimentRecord],
        keep: Callable[[ExperimentRecord], None],
    ) -> None:
        self.loaded, self.settings, self.watch, self.keep = loaded, settings, watch, keep
        self.texts = settings.texts if text is None else (TYPED,)
        self.shape = read_config(loaded.model.config.to_dict())
        if not self.shape.packed_layers:
            raise SizingError("no layer of this model has plain full attention, so nothing of its cache is compressed")
        longest = self.shape.max_positions or MOST_TOKENS
        self.tokens = settings.tokens or min(longest, MOST_TOKENS)
        self.candidates = candidates(settings.recipes, self.size)
        with reading(given={} if text is None else {TYPED: text}) as self.read:
            self.known = reusable_for(loaded, self.texts, known).records
            self.choosing, self.confirming = self._parts()
        self.full: dict[str, FullRun] = {}
        self.tried: dict[tuple[str, Part], Tried] = {}
        self.layer_kl: dict[int, float] = {}
        self.lower: Bits | None = None
        self.steps, self.reused, self.before = 0, 0, frozenset(self.known)

    def sized(self, method: Method, tokens: int) -> KVBytes:
        """Estimate a cache of so many tokens."""
        return kv_bytes(self.shape, method, tokens, value_bytes=self.loaded.model.dtype.itemsize)

    def size(self, method: Method) -> int:
        """Bytes of a cache (estimated) where sizes are compared."""
        return self.sized(method, self.tokens).bytes

    def _parts(self) -> tuple[PerplexitySettings, PerplexitySettings]:
        """Return what is read to choose and to confirm: windows from the start and from the middle of the texts."""
        asked, tokenizer = self.settings, self.loaded.tokenizer
        starts = {name: first_packed(parse_method(name)) for name in asked.recipes}
        slowest = max(starts, key=lambda name: starts[name])
        least, because = 2 * starts[slowest], f"half of each is read first, and {slowest} packs from {starts[slowest]}"
        longest = min(asked.context, self.shape.max_positions or asked.context)
        if longest < least:
            raise PromptError(f"context must be at least {least} tokens ({because}), got {longest}")
        head = len(tokenizer("").input_ids)
        counts = {
            name: len(tokenizer(read_text(name), add_special_tokens=False, verbose=False).input_ids)
            for name in self.texts
        }
        shortest = min(counts, key=lambda name: counts[name])
        half = counts[shortest] // 2
        context = min(longest, half // asked.windows - 1 + head)
        if context < least:
            raise PromptError(
                f"the text {shortest} has {counts[shortest]:,} tokens, too few to choose on one half and confirm on "
                f"the other: that takes {2 * asked.windows * (least + 1 - head):,}, in windows of {least} ({because})"
            )
        shared: dict[str, Any] = {"texts": self.texts, "context": context, "windows": asked.windows}
        choosing = PerplexitySettings(prefill=context // 2, **shared)
        return choosing, choosing.model_copy(update={"start": half})

    @cached_property
    def expected_steps(self) -> int:
        """About how many measurements are made, for the progress."""
        layers = len(self.shape.packed_layers) if self.settings.layers else 0
        return 2 * ceil(log2(len(self.candidates) + 1)) + 2 + layers + (3 + ceil(log2(layers)) if layers else 0)

    def record(self, method: str, settings: PerplexitySettings, doing: str) -> ExperimentRecord:
        """Return the record of a method, measured now unless it is known; the full cache reads each part once."""
        (cell,) = cells_for(EXPERIMENT, self.loaded.spec.name, [parse_method(method)], [settings], self.loaded.weights)
        found = self.known.get(cell.key)
        if found is not None and found.error is None:
            self.reused += cell.key in self.before
            return found
        self.watch.check()
        if self.watch.stopping():
            raise CancelledError
        step = min(self.steps, self.expected_steps - 1)
        span = self.watch.part(step / self.expected_steps, (step + 1) / self.expected_steps)
        inner = replace(
            span,
            progress=lambda fraction, text: span.progress(fraction, f"{doing}: {method}"),
            stopping=lambda: False,  # what is in hand is finished
        )
        if (part := settings.model_dump_json()) not in self.full:
            self.full[part] = read_full(self.loaded, settings, inner.part(0, 0.5))
        experiment = replace(EXPERIMENT, run=partial(run_perplexity, full=self.full[part]))
        (record,) = run_group(experiment, [cell], Models(lambda name, weights: self.loaded), inner)
        self.steps += 1
        self.known[cell.key] = record
        self.keep(record)
        return record

    def try_out(self, method: str, part: Part) -> Tried:
        """Measure a method on one part and hold it against the limits."""
        if (method, part) not in self.tried:
            settings = self.choosing if part == "choose" else self.confirming
            record = self.record(method, settings, "choosing" if part == "choose" else "confirming")
            figures, held = record.metrics, record.cache
            self.tried[method, part] = Tried(
                method=method,
                part=part,
                kl=figures.get("kl_mean"),
                kl_low=figures.get("kl_low"),
                kl_high=figures.get("kl_high"),
                same_top_pct=figures.get("same_top_pct"),
                measured_tokens=int(figures.get("measured_tokens") or 0),
                bytes=held.bytes if held else None,
                full_bytes=held.full_precision_bytes if held else None,
                bits_per_value=held.bits_per_value if held else None,
                packed_bits=figures.get("packed_bits_per_value"),
                estimated_bytes=self.size(parse_method(method)),
                failure=record.error or self.settings.failure(figures.get("kl_mean"), figures.get("same_top_pct")),
            )
        return self.tried[method, part]

    def passes(self, method: str, part: Part) -> bool:
        """Is a method within the limits on one part?"""
        return self.try_out(method, part).failure is None

    def run(self) -> Recommendation:
        """Search, then look back at what was found."""
        started = time.perf_counter()
        with reading(self.read):
            found = smallest(
                self.candidates,
                lambda one: self.passes(one.method, "choose"),
                lambda one: self.passes(one.method, "confirm"),
            )
            method = found.method if found else None
            if found and self.settings.layers:
                method = self.fewer_bits(found) or found.method
        known = {one.method for one in self.candidates}
        close = [one for one in self.tried.values() if one.failure and one.kl is not None]
        return Recommendation(
            settings=self.settings,
            texts=self.texts,
            model=model_info(self.loaded),
            environment=environment(self.loaded.model.device),
            method=method,
            uniform=found.method if found else None,
            closest=None if found or not close else min(close, key=_kl).method,
            context=self.choosing.context,
            prefill=self.choosing.prefill,
            tokens=self.tokens,
            candidates=len(self.candidates),
            measured=len({one.method for one in self.tried.values()} & known),
            tried=tuple(self.tried.values()),
            layer_kl=self.layer_kl,
            lower_bits=self.lower,
            memory=self.memory(method) if method else (),
            reused=self.reused,
            seconds=time.perf_counter() - started,
        )

    def fewer_bits(self, found: Candidate) -> str | None:
        """Return the method with fewer bits in the layers that stand it best; None where that does not pay."""
        steps = [one for one in self.candidates if one.within(found) and one.bits in one_step_down(found.bits)]
        if not steps or not takes_layers(parse_method(found.method)):
            return None
        below = min(steps, key=lambda one: _kl(self.try_out(one.method, "choose")))
        self.lower = below.bits
        quick = self.choosing.model_copy(
            update={"context": min(self.choosing.context, self.choosing.prefill + LAYER_TOKENS)}
        )
        packed = self.shape.packed_layers
        for layer in packed:
            record = self.record(with_layers(found.method, [layer], below.bits), quick, "layer by layer")
            if (kl := record.metrics.get("kl_mean")) is not None:
                self.layer_kl[layer] = kl
        order = sorted(self.layer_kl, key=lambda layer: self.layer_kl[layer])

        def lowered(count: int) -> str:
            if 2 * count <= len(packed):
                return with_layers(found.method, order[:count], below.bits)
            return with_layers(below.method, sorted(set(packed) - set(order[:count])), found.bits)

        count = most(len(order) - 1, lambda count: self.passes(lowered(count), "choose"))
        while count and not self.passes(lowered(count), "confirm"):
            count //= 2
        return lowered(count) if count and self.size(parse_method(lowered(count))) < found.size else None

    def memory(self, method: str) -> tuple[Memory, ...]:
        """Return what a method holds: measured, then estimated for longer contexts up to the model's longest."""
        held = self.try_out(method, "confirm")
        assert held.bytes is not None
        assert held.full_bytes is not None
        context, longest = self.choosing.context, self.shape.max_positions or MOST_TOKENS
        rows = [Memory(tokens=context, bytes=held.bytes, full_bytes=held.full_bytes, measured=True)]
        for tokens in sorted(one for one in {longest // 16, longest // 4, longest, self.tokens} if one > context):
            size = self.sized(parse_method(method), tokens)
            rows.append(Memory(tokens=tokens, bytes=size.bytes, full_bytes=size.full_precision_bytes, measured=False))
        return tuple(rows)


def _kl(one: Tried) -> float:
    return inf if one.kl is None else one.kl


def candidates(recipes: Iterable[str], size: Callable[[Method], int]) -> list[Candidate]:
    """Return every recipe with every pair of `BITS` that lie no more than `MOST_APART` steps apart.

    Args:
        recipes: Methods without bits, such as `rtn:rotation=hadamard`.
        size: Bytes that a method's cache holds.
    """
    found: dict[str, Candidate] = {}
    for recipe in recipes:
        for bits in product(BITS, BITS):
            if abs(BITS.index(bits[0]) - BITS.index(bits[1])) > MOST_APART:
                continue
            method = parse_method(f"{recipe}{',' if ':' in recipe else ':'}key_bits={bits[0]},value_bits={bits[1]}")
            found.setdefault(str(method), Candidate(str(method), recipe, bits, size(method)))
    return list(found.values())


def first_packed(method: Method) -> int:
    """Return the length of the shortest text of which a method packs a token."""
    return method.sink_length + method.residual_length + method.block_length


def takes_layers(method: Method) -> bool:
    """Can single layers be given other bits?"""
    return any(field.name == "layers" for field in fields(method))


def with_layers(method: str, layers: Sequence[int], bits: Bits) -> str:
    """Return a method with other bits in some layers."""
    return str(parse_method(f"{method},layers={write_layer_bits(dict.fromkeys(layers, bits))}"))


def one_step_down(bits: Bits) -> list[Bits]:
    """Return the pairs of `BITS` with one step less in keys, or in values."""
    keys, values = (BITS[max(BITS.index(one) - 1, 0)] for one in bits)
    return [pair for pair in ((keys, bits[1]), (bits[0], values)) if pair != bits]
