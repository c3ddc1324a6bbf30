"""The catalogue of metrics: what a figure is called, its unit and digits, which way is better, what it means.

Tables, charts, exports and pages ask `metric(name)` by the figure's name in records. Names made of a listed one and a
variant ("full_tokens_per_second", "kl_low") need no entry; one that is not known gets a name and unit by its ending.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

NONE = "-"
"""Stands in a table for a figure that could not be had."""
MISSING = "not measured"
"""The same in a sentence."""

SMALL = ".4f*"
"""Four digits behind the point, or two that mean something where the figure is below 0.001."""
SPEED = ",.1f*"
"""One digit behind the point, or two where the figure is below 10."""
BYTES = "bytes"
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Return a size for people: 1536 is `1.50 KiB`."""
    size = abs(count)
    for unit in _SIZES:
        if size < 1024 or unit == _SIZES[-1]:
            return f"{'-' * (count < 0)}{size:{'.0f' if unit == 'B' else '.2f'}} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        title: What it is called, in lower case but for names.
        unit: Of the number; "" where it has none, `BYTES` for sizes, which are written with the unit that fits.
        digits: How a number is written, as `format` reads it, or `SMALL`.
        better: Which of two values is the better one; None where neither is.
        definition: One or two sentences for those who meet it for the first time.
        short: Its title where there is little room; "" for the title itself.
    """

    title: str
    unit: str = ""
    digits: str = ".2f"
    better: Literal["higher", "lower"] | None = None
    definition: str = ""
    short: str = ""

    @property
    def label(self) -> str:
        """In the head of a table: the title with its unit."""
        return self._with_unit(self.title)

    @property
    def column(self) -> str:
        """In the head of a narrow table: the short title without a unit."""
        return self.short or self.title

    @property
    def head(self) -> str:
        """In the head of a narrow table whose cells have no units."""
        return self._with_unit(self.column)

    @property
    def heading(self) -> str:
        """At the beginning of a line."""
        return self.title[:1].upper() + self.title[1:]

    @property
    def spelled(self) -> str:
        """In files: the title with its unit in words."""
        return self.title + {"%": ", percent", "nats": " in nats"}.get(self.unit, "")

    @property
    def axis(self) -> str:
        """At the axis of a chart: the label, and which way is better."""
        return self.label + (f" ({self.better} is better)" if self.better else "")

    def hover(self, place: str = "y") -> str:
        """Under the pointer in a chart: a value of plotly's `place` with its unit."""
        digits = {SMALL: ".3g", SPEED: ",.3g"}.get(self.digits, self.digits)
        return f"%{{{place}:{digits}}} {self.unit}".rstrip()

    @property
    def help(self) -> str:
        """The definition, and which way is better."""
        return " ".join(filter(None, (self.definition, self.better and f"{self.better.capitalize()} is better.")))

    def _with_unit(self, title: str) -> str:
        return f"{title}, {self.unit}" if self.unit and self.unit != BYTES else title

    def text(self, value: float | None, *, sign: bool = False) -> str:
        """Return a figure as it stands in a cell: no unit, a dash where it could not be had.

        A small figure is not written as 0. With its sign a figure is a difference.
        """
        if value is None:
            return NONE
        plus = "+" if value > 0 and (sign or self.digits.startswith("+")) else ""
        return plus + self._digits(value)

    def _digits(self, value: float) -> str:
        digits = self.digits.removeprefix("+")
        if self.unit == BYTES:
            return human_bytes(value)
        if digits == SPEED:
            return format(value, ",.1f" if abs(value) >= 10 else ".2f")
        if digits == SMALL:
            return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
        return f"{value:,.0f}" if digits == ".2f" and abs(value) >= 1000 else format(value, digits)

    def said(self, value: float | None, *, sign: bool = False) -> str:
        """Return a figure as it stands in a sentence: with its unit, or that it was not measured.

        A difference of shares is one in percentage points.
        """
        if value is None:
            return MISSING
        unit = "" if self.unit == BYTES else "points" if sign and self.unit == "%" else self.unit
        return f"{self.text(value, sign=sign)} {unit}".rstrip()

    def loss(self, value: float) -> float:
        """Return a number that is the lower the better the figure.

        Raises:
            ValueError: If neither way is better.
        """
        if self.better is None:
            raise ValueError(f"{self.title} has no better direction")
        return value if self.better == "lower" else -value

    def best(self, values: Sequence[float | None]) -> int | None:
        """Return which of several values is better than all others; None where none is, or one is missing."""
        known = [self.loss(value) for value in values if value is not None] if self.better else []
        if not known or len(known) < len(values) or known.count(min(known)) > 1:
            return None
        return known.index(min(known))


_FOUND = "In how many of the prompts the answer held the hidden fact."
_NEW_TOKENS = (
    "New tokens of all rows a second, the first of each row left out; a median where there are several rounds."
)
_COSINE = "It can look fine while the most attended token changes, so read it next to the top-1 match and the KL."
_ENCODE = "Time spent packing keys and values"
_ATTENTION = "Time spent on scores, softmax and weighted values in all layers"
_BY_SIDE = "From one extra run with instruments."

METRICS: dict[str, Metric] = {
    # memory
    "bits_per_value": Metric(
        "bits a value held",
        better="lower",
        short="bits held",
        definition=(
            "Everything the cache holds at the end, in bits, divided by the cached values: codes, scales, exact "
            "tokens in 16 bits, spare room, tables. The 16-bit baseline holds 16, a full cache in float32 32."
        ),
    ),
    "packed_bits_per_value": Metric(
        "bits a packed value",
        better="lower",
        short="packed bits",
        definition=(
            "Codes and scales of the packed tokens alone, in bits a value: what one more token costs in a long text. "
            "Empty where nothing is packed or some layers are not compressed."
        ),
    ),
    "compression_ratio": Metric(
        "times smaller",
        better="higher",
        definition=(
            "The 16-bit baseline (2 bytes a value) divided by the bytes really held, everything counted; below 1 the "
            "cache is larger."
        ),
    ),
    "payload_ratio": Metric(
        "payload ratio",
        better="higher",
        definition=("A formula: 16 divided by the bits of a code, without norms, exact tokens, spare room or tables."),
    ),
    "cache_bytes": Metric(
        "KV cache held",
        BYTES,
        better="lower",
        short="bytes held",
        definition=(
            "Bytes the cache really holds at the end, summed over every storage reachable from it: codes, scales, "
            "exact tokens, spare room and shared tables."
        ),
    ),
    "full_precision_bytes": Metric(
        "16-bit baseline", BYTES, definition="What the same tokens take at 2 bytes a value, whatever the run's dtype."
    ),
    "estimated_bytes": Metric(
        "estimated size",
        BYTES,
        better="lower",
        definition="Bytes the cache would hold at the context where sizes are compared.",
    ),
    "peak_memory_bytes": Metric(
        "peak memory",
        BYTES,
        better="lower",
        definition=(
            "How far memory grew during the run, activations included: what the allocator reached on a GPU, the "
            "process's resident memory, sampled, on a CPU."
        ),
    ),
    "byte_floor": Metric(
        "times the byte floor",
        better="lower",
        short="x byte floor",
        definition=(
            "Bytes held, divided by the byte floor. The floor is a formula: every cached value at the bits of its code "
            "alone, without scales, exact tokens, spare room or tables. 1 is the floor; nothing can go below it at "
            "these bits. It is about memory held, not about the time in which a kernel reads it."
        ),
    ),
    # attention heads
    "cosine_scores": Metric(
        "cosine of scores",
        digits=".4f",
        better="higher",
        definition=f"How alike a head's scores are under full and compressed keys; 1 is the same. {_COSINE}",
    ),
    "cosine_weights": Metric(
        "cosine of weights",
        digits=".4f",
        better="higher",
        definition=f"How alike a head's softmax weights are under full and compressed keys; 1 is the same. {_COSINE}",
    ),
    "top1_match_pct": Metric(
        "top-1 match",
        "%",
        ".1f",
        "higher",
        "How often the token a head attends to most is the same under full and compressed keys.",
    ),
    "top5_match_pct": Metric(
        "top-5 match",
        "%",
        ".1f",
        "higher",
        "How often the token a head attends to most under full keys is among its five most attended ones under "
        "compressed keys.",
    ),
    "heads_at_risk_pct": Metric(
        "heads at risk",
        "%",
        ".1f",
        "lower",
        "A head is at risk in a step when the token it attends to most changes once its keys are compressed. It equals "
        "one minus the top-1 match. A head at risk does not by itself change the next token.",
    ),
    "top1_miss_pct": Metric(
        "top-1 miss",
        "%",
        ".1f",
        "lower",
        "In which share of the measured steps the token a head attends to most changes.",
        "steps at risk",
    ),
    "top5_miss_pct": Metric(
        "top-5 miss",
        "%",
        ".1f",
        "lower",
        "In which share of the measured steps the token a head attends to most is not even among the five most "
        "attended ones under compressed keys.",
    ),
    "output_error": Metric(
        "output error",
        digits=".4f",
        better="lower",
        definition="How far a head's output moves, values compressed too, as a share of its length.",
    ),
    "needle_rank": Metric(
        "needle rank",
        digits=".0f",
        better="lower",
        definition="Place of the needle among all tokens by attention from the last one, median over heads.",
    ),
    "needle_heads": Metric(
        "heads on the needle", digits=".0f", better="higher", definition="Heads that attend to the needle most."
    ),
    "needle_heads_kept_pct": Metric(
        "heads kept on the needle",
        "%",
        ".1f",
        "higher",
        "How many of the heads that attend to the needle most with full keys still do.",
    ),
    "needle_mass_pct": Metric(
        "attention on the needle", "%", definition="Its share of the heads' attention from the last token, mean."
    ),
    # predictions
    "kl_mean": Metric(
        "KL",
        "nats",
        SMALL,
        "lower",
        "How far the next-token distribution moves under the compressed cache when a text is read through it, in "
        "nats; mean over the measured tokens. 0 is no change.",
    ),
    "mean_kl": Metric(
        "mean KL",
        "nats",
        SMALL,
        "lower",
        "How far the next-token distribution moves when the original answer is read through the compressed cache, in "
        "nats; mean over the answer's tokens. 0 is no change.",
    ),
    "kl_p99": Metric("KL, 99th percentile", "nats", SMALL, "lower", "One token in a hundred moves further than this."),
    "same_top_pct": Metric(
        "same top token",
        "%",
        ".1f",
        "higher",
        "At how many of the measured tokens the most likely next token stays the same when a text or the original "
        "answer is read through the compressed cache.",
        "same top",
    ),
    "delta_ppl_pct": Metric(
        "perplexity change",
        "%",
        "+.2f",
        "lower",
        "By how much perplexity on the text rises against the full cache; below 0 it falls.",
    ),
    "ppl": Metric("perplexity", better="lower", definition="Perplexity of the text read through the cache."),
    "success_pct": Metric("found", "%", ".0f", "higher", _FOUND),
    # answers
    "agreed_tokens": Metric(
        "first divergence",
        "tokens",
        ".1f",
        "higher",
        "Tokens before an answer first differs from the full cache's; all of them where it never does. Mean over the "
        "answers.",
    ),
    "identical_pct": Metric(
        "identical answers", "%", ".1f", "higher", "Share of greedy answers without any difference."
    ),
    "same_tokens_pct": Metric(
        "same tokens", "%", ".1f", "higher", "Share of greedy tokens that equal the full cache's, place by place."
    ),
    # speed
    "tokens_per_second": Metric("speed", "tokens/s", SPEED, "higher", _NEW_TOKENS),
    "speed_ratio": Metric("speed ratio", better="higher", definition="Tokens a second against the full cache's."),
    "time_to_first_token_ms": Metric(
        "first token",
        "ms",
        ".0f",
        "lower",
        "Time from the start of the prompt's reading to the first new token; a median where there are several rounds.",
    ),
    "encode_prompt_ms": Metric("encode, prompt", "ms", ".1f", "lower", f"{_ENCODE} of the prompt. {_BY_SIDE}"),
    "encode_step_ms": Metric("encode, a step", "ms", ".2f", "lower", f"{_ENCODE} in a step. {_BY_SIDE}"),
    "encode_share_pct": Metric(
        "encode, share of a step", "%", ".1f", "lower", f"{_ENCODE}, as a share of a step that is timed without it."
    ),
    "attention_prompt_ms": Metric("attention, prompt", "ms", ".1f", "lower", f"{_ATTENTION}: the prompt. {_BY_SIDE}"),
    "attention_step_ms": Metric("attention, a step", "ms", ".1f", "lower", f"{_ATTENTION}: a step. {_BY_SIDE}"),
    "step_ms": Metric("a step", "ms", ".1f", "lower", "One new token of every row."),
    "worst_step_ms": Metric("longest step", "ms", ",.0f", "lower", "The longest single step of all rounds."),
    # kernels and shapes alone
    "us": Metric("one call", "us", ",.1f", "lower", "The median of timed rounds; sides take turns."),
    "floor_us": Metric("time of the byte floor", "us", ",.1f", None, "What a copy here takes to move the bytes held."),
    "floor_fraction": Metric("share of the byte floor", better="higher", definition="The byte floor over the time."),
    "moved_bytes": Metric("moved", BYTES, definition="What is read and written at least."),
    "gb_per_second": Metric("bandwidth", "GB/s", ",.0f", "higher", "Bytes moved at least, by the time it took."),
    "copy_gb_per_second": Metric("bandwidth of a copy", "GB/s", ",.0f", None, "Read and written, of a large copy."),
    "copy_fraction": Metric("share of a copy's bandwidth", better="higher", definition="Against a large copy here."),
    "vectors": Metric("vectors packed", digits=",.0f", definition="Keys and values of all heads."),
    "exact_tokens": Metric("tokens held exactly", digits=",.0f", definition="Sinks, window and the query tokens."),
    "longest_context": Metric("longest context reached", "tokens", ",.0f", "higher", "The last that decoded."),
    "weight_bytes": Metric("weights held", BYTES, definition="What the model's weights take on the GPU."),
    "vectorised_ms": Metric("all heads at once", "ms", ",.1f", "lower", "As the lab compares them."),
    "loop_ms": Metric("head by head", "ms", ",.1f", None, "The obvious loop over heads and queries."),
    # families of models
    "layers": Metric("layers", digits=".0f", definition="All of the model."),
    "compressed_layers": Metric(
        "layers compressed", digits=".0f", definition="Those whose keys and values are packed."
    ),
    "logit_error": Metric(
        "logit error",
        digits=SMALL,
        better="lower",
        definition="The largest difference from the unmodified model's logits, in their standard deviations.",
    ),
    # codes on random unit vectors
    "mse": Metric("MSE", digits=SMALL, better="lower", definition="Mean squared error of a unit vector."),
    "inner_product": Metric(
        "inner product error",
        digits=SMALL,
        better="lower",
        definition="Mean squared error of inner products with random unit queries, times the dimensions.",
        short="IP error",
    ),
    "gain": Metric(
        "gain",
        digits=".4f",
        definition="Mean estimate over truth for queries at cosine 0.6 with their key; 1 is unbiased.",
    ),
    "recall_pct": Metric(
        "recall@1", "%", ".0f", "higher", "How often a query finds its nearest key among near neighbours."
    ),
    "encode_vectors_per_second": Metric("encoded", "vectors/s", ",.0f", "higher", "Vectors turned into codes."),
    "decode_vectors_per_second": Metric("decoded", "vectors/s", ",.0f", "higher", "Vectors read back from codes."),
    "largest_z": Metric(
        "z", digits=".1f", better="lower", definition="Standard errors from theory, the largest of the checks."
    ),
    # counts
    "prompt_tokens": Metric("prompt tokens", digits=",.0f", definition="Tokens of the prompt."),
    "answer_tokens": Metric("answer tokens", digits=",.0f", definition="Tokens of the answer."),
    "compressed_tokens": Metric("tokens packed", digits=",.0f", definition="Tokens that are held as codes."),
    "measured_tokens": Metric("tokens measured", digits=",.0f", definition="Tokens whose prediction is compared."),
    "repetitions": Metric("prompts", digits=",.0f", definition="Prompts at one length and depth."),
}
METRICS["cosine_similarity"] = METRICS["cosine_scores"]
METRICS["bytes"] = METRICS["cache_bytes"]
METRICS["kl"] = METRICS["kl_mean"]

_VARIANTS = {
    "full": ("full", "With nothing compressed."),
    "original": ("original", "With the full cache."),
    "lossless": ("lossless", "Packed without rounding."),
    "one_call": ("in one call", "Of a prompt that is read in one call."),
    "own": ("own model", "Of a model that was made elsewhere and attached."),
    "packed": ("packed only", "Over packed tokens alone."),
    "served": ("as served", "Over all tokens, as the model sees them."),
    "sampled": ("sampled", "Of sampled answers."),
    "by_rotation": ("by rotation seed", "A mean a rotation seed."),
    "by_sampling": ("by sampling seed", "A mean a sampling seed."),
    "median": ("median", "The median instead."),
    "low": ("from", "The lower end of its 95 % interval."),
    "high": ("to", "The upper end of its 95 % interval."),
    "p20": ("20 %", "The 20th percentile of the rounds."),
    "p80": ("80 %", "The 80th percentile of the rounds."),
    "theory": ("theory", "The exact expectation."),
    "prod_gaussian": ("prod", "Of TurboQuant_prod with a Gaussian projection."),
    "prod_orthogonal": ("prod orthogonal", "Of TurboQuant_prod with an orthogonal projection."),
    "mse": ("mse", "Of TurboQuant_mse."),
    "matched": ("matched", "Of TurboQuant_mse with norms that match."),
    "unbiased": ("unbiased", "Of TurboQuant_mse with scales without bias."),
}
_ENDINGS = {"_pct": ("%", ".1f"), "_ms": ("ms", ".2f"), "_bytes": (BYTES, "")}


@cache
def known(name: str) -> Metric | None:
    """Return what is known of a figure by its name in records: its entry, or that of which it is a variant."""
    if name in METRICS:
        return METRICS[name]
    for part, (title, definition) in _VARIANTS.items():
        before, found, after = f"_{name}_".partition(f"_{part}_")
        if found and (base := known(f"{before}_{after}".strip("_"))):
            meaning = f"{base.definition} {definition}"
            return replace(base, title=f"{base.title}, {title}", definition=meaning, short=f"{base.column}, {title}")
    return None


def metric(name: str) -> Metric:
    """Return what is known of a figure by its name in records, or what its name tells."""
    if found := known(name):
        return found
    for ending, (unit, digits) in _ENDINGS.items():
        if name.endswith(ending):
            return Metric(name.removesuffix(ending).replace("_", " "), unit, digits)
    return Metric(name.replace("_", " "))
