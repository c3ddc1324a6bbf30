"""The catalogue of metrics: what a figure of a record is called, how it is written, what it means.

Tables of reports take names and digits from here, pages definitions. A figure that is not listed gets a name and digits
by its ending.
"""

from dataclasses import dataclass

NONE = "-"
"""Stands for a figure that could not be had."""

SMALL = ".4f*"
"""Four digits behind the point, or two that mean something where the figure is below 0.001."""


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        label: In the head of a table, with its unit.
        digits: How a number is written, as `format` reads it, or `SMALL`.
        definition: One or two sentences for those who meet it for the first time.
    """

    label: str
    digits: str = ".2f"
    definition: str = ""

    def text(self, value: float | None) -> str:
        """Return a figure as shown; one that could not be had is a dash, and a small one is not written as 0."""
        if value is None:
            return NONE
        if self.digits == SMALL:
            return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"
        if self.digits == ".2f" and abs(value) >= 1000:
            return f"{value:,.0f}"
        return format(value, self.digits)


METRICS: dict[str, Metric] = {
    "bits_per_value": Metric(
        "bits a value held",
        definition=(
            "Everything the cache holds at the end, in bits, divided by the cached values: codes, scales, exact "
            "tokens in the model's own number format, spare room, tables. A full cache in float32 holds 32."
        ),
    ),
    "packed_bits_per_value": Metric(
        "bits a packed value",
        definition=(
            "Codes and scales of the packed tokens alone, in bits a value: what one more token costs in a long text. "
            "Empty where nothing is packed or some layers are not compressed."
        ),
    ),
    "compression_ratio": Metric(
        "compression",
        definition=("The 16-bit baseline (2 bytes a value) divided by the bytes really held; below 1 it is larger."),
    ),
    "cosine_similarity": Metric(
        "cosine",
        digits=".4f",
        definition=("How alike a head's scores are under full and compressed keys; 1 is the same."),
    ),
    "top1_match_pct": Metric(
        "top-1 match, %",
        digits=".1f",
        definition=("How often the token a head attends to most is the same under full and compressed keys."),
    ),
    "top5_match_pct": Metric(
        "top-5 match, %",
        digits=".1f",
        definition=(
            "How often the token a head attends to most under full keys is among its five most attended ones under "
            "compressed keys."
        ),
    ),
    "kl_mean": Metric(
        "KL, nats",
        digits=SMALL,
        definition=(
            "How far the next-token distribution moves under the compressed cache when a text is read through it, in "
            "nats; mean over the measured tokens. 0 is no change."
        ),
    ),
    "kl_p99": Metric(
        "KL, 99th percentile",
        digits=SMALL,
        definition=("One token in a hundred moves further than this."),
    ),
    "same_top_pct": Metric(
        "same top token, %",
        digits=".1f",
        definition=("At how many of the measured tokens the most likely next token stays the same."),
    ),
    "delta_ppl_pct": Metric(
        "perplexity change, %",
        digits=".1f",
        definition=("By how much perplexity on the text rises against the full cache; below 0 it falls."),
    ),
    "ppl_full": Metric(
        "perplexity, full",
        definition=("Perplexity of the text with the full cache."),
    ),
    "ppl": Metric(
        "perplexity",
        definition=("Perplexity of the text read through the cache."),
    ),
    "needle_rank_full": Metric(
        "needle rank, full",
        digits=".0f",
    ),
    "needle_rank": Metric(
        "needle rank",
        digits=".0f",
        definition=("Place of the needle among all tokens by attention from the last one, median over heads."),
    ),
    "success_full_pct": Metric(
        "found, full, %",
        digits=".1f",
    ),
    "success_pct": Metric(
        "found, %",
        digits=".1f",
        definition=("In how many of the prompts the answer held the hidden fact."),
    ),
    "full_tokens_per_second": Metric(
        "full, tokens/s",
        digits=".1f",
    ),
    "tokens_per_second": Metric(
        "tokens/s",
        digits=".1f",
        definition=("New tokens of all rows a second, the first left out."),
    ),
    "speed_ratio": Metric(
        "speed ratio",
        definition=("Tokens a second against the full cache's."),
    ),
    "mse": Metric(
        "MSE",
        digits=SMALL,
        definition=("Mean squared error of a unit vector."),
    ),
    "mse_theory": Metric(
        "MSE, theory",
        digits=SMALL,
    ),
    "inner_product_prod_gaussian": Metric(
        "inner product, prod",
        digits=SMALL,
    ),
    "inner_product_prod_gaussian_theory": Metric(
        "inner product, theory",
        digits=SMALL,
    ),
}

_ENDINGS = {"_pct": (", %", ".1f"), "_tokens_per_second": (", tokens/s", ".1f"), "_ms": (", ms", ".2f")}


def metric(name: str) -> Metric:
    """Return what is known of a figure by its name in records, or what its name tells."""
    if name in METRICS:
        return METRICS[name]
    for ending, (unit, digits) in {**_ENDINGS, "_bytes": (", bytes", ",.0f")}.items():
        if name.endswith(ending):
            return Metric(name.removesuffix(ending).replace("_", " ") + unit, digits=digits)
    if name.startswith("needle_rank"):
        return Metric(name.replace("_", " "), digits=".0f")
    small = name.startswith("kl") or "mse" in name or "inner_product" in name
    return Metric(name.replace("_", " "), digits=SMALL if small else ".4f" if "cosine" in name else ".2f")
