"""The catalogue of metrics: what a figure of a record is called, how it is written, which way is better, what it means.

Tables, pages, commands and exports take their words and digits from here. A figure that is not listed gets a name and
digits by its ending.
"""

from dataclasses import dataclass
from typing import Literal

NONE = "-"
"""Stands for a figure that could not be had."""


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        label: In the head of a table, with its unit.
        short: In a narrow table; the label where there is none.
        digits: How a number is written, as `format` reads it.
        better: Which way is better, or "" where neither is.
        definition: One sentence for those who meet it for the first time.
    """

    label: str
    short: str = ""
    digits: str = ".2f"
    better: Literal["more", "less", ""] = ""
    definition: str = ""

    @property
    def column(self) -> str:
        """Its name in a narrow table."""
        return self.short or self.label

    def text(self, value: float | None) -> str:
        """Return a figure as shown; one that could not be had is a dash, and a small one is not written as 0."""
        if value is None:
            return NONE
        if self.digits == ".4f*":
            return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"
        if self.digits == ".2f" and abs(value) >= 1000:
            return f"{value:,.0f}"
        return format(value, self.digits)


SMALL = ".4f*"
"""Four digits behind the point, or two that mean something where the figure is below 0.001."""

METRICS: dict[str, Metric] = {
    "bits_per_value": Metric(
        "bits a value held",
        "bits held",
        better="less",
        definition="Everything the cache holds, in bits, divided by the cached values; 16 is the 16-bit baseline.",
    ),
    "packed_bits_per_value": Metric(
        "bits a packed value",
        "packed",
        better="less",
        definition="Codes and scales of the packed tokens alone, in bits a value: what one more token costs.",
    ),
    "compression_ratio": Metric(
        "compression",
        "ratio",
        better="more",
        definition="The 16-bit baseline (2 bytes a value) divided by the bytes really held, everything counted.",
    ),
    "cosine_similarity": Metric(
        "cosine",
        digits=".4f",
        better="more",
        definition="How alike a head's scores are under full and compressed keys; 1 is the same.",
    ),
    "top1_match_pct": Metric(
        "top-1 match, %",
        "top-1 %",
        ".1f",
        "more",
        "How often the token a head attends to most is the same under full and compressed keys.",
    ),
    "top5_match_pct": Metric(
        "top-5 match, %",
        "top-5 %",
        ".1f",
        "more",
        "How often the most attended token under full keys is among the five most attended under compressed ones.",
    ),
    "kl_mean": Metric(
        "KL, nats",
        "KL mean",
        SMALL,
        "less",
        "How far the next-token distribution moves under the compressed cache, mean over tokens; 0 is no change.",
    ),
    "kl_p99": Metric("KL, 99th percentile", "KL p99", SMALL, "less", "One token in a hundred moves further than this."),
    "same_top_pct": Metric(
        "same top token, %",
        "same top %",
        ".1f",
        "more",
        "How often the most likely next token is the same when the text is read through the compressed cache.",
    ),
    "delta_ppl_pct": Metric(
        "perplexity change, %",
        "dPPL %",
        ".1f",
        "less",
        "By how much perplexity on the text rises against the full cache; below 0 it falls.",
    ),
    "ppl_full": Metric("perplexity, full", "full PPL", definition="Perplexity of the text with the full cache."),
    "ppl": Metric("perplexity", "PPL", better="less", definition="Perplexity of the text read through the cache."),
    "needle_rank_full": Metric("needle rank, full", "full", ".0f", "less"),
    "needle_rank": Metric(
        "needle rank",
        digits=".0f",
        better="less",
        definition="Place of the needle among all tokens by attention from the last one, median over heads.",
    ),
    "success_full_pct": Metric("found, full, %", "full %", ".1f", "more"),
    "success_pct": Metric(
        "found, %", "found %", ".1f", "more", "In how many of the prompts the answer held the hidden fact."
    ),
    "full_tokens_per_second": Metric("full, tokens/s", digits=".1f", better="more"),
    "tokens_per_second": Metric(
        "tokens/s", digits=".1f", better="more", definition="New tokens of all rows a second, the first left out."
    ),
    "speed_ratio": Metric("speed ratio", better="more", definition="Tokens a second against the full cache's."),
    "mse": Metric("MSE", digits=SMALL, better="less", definition="Mean squared error of a unit vector."),
    "mse_theory": Metric("MSE, theory", digits=SMALL),
    "inner_product_prod_gaussian": Metric("inner product, prod", digits=SMALL, better="less"),
    "inner_product_prod_gaussian_theory": Metric("inner product, theory", digits=SMALL),
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
