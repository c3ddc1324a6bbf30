"""A comparison in figures: their names, units and provenance lines. Plain text; the sentence is the library's."""

from typing import Literal

from turboquant.records.comparison import Comparison
from turboquant.records.verdict import cache_size, human_bytes, quoted, verdict

__all__ = ["cache_size", "cosine", "facts", "human_bytes", "number", "percent", "provenance", "quoted", "verdict"]

MISSING = "not measured"


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A number with its unit, or the words for a missing one."""
    return MISSING if value is None else f"{value:,.{digits}f}{unit}"


def cosine(value: float | None) -> str:
    """A cosine with the digits that tell a good one from a very good one."""
    return number(value, 4)


def percent(value: float | None) -> str:
    """A percentage with one digit, or the words for a missing one."""
    return MISSING if value is None else f"{value:.1f}\N{NARROW NO-BREAK SPACE}%"


def provenance(c: Comparison, side: Literal["original", "compressed"]) -> str:
    """What one answer was made with, measured in that run."""
    result, model = getattr(c, side), c.model
    r = result.report
    exact = f"{r.compressed_tokens:,} tokens packed, {r.exact_tokens:,} exact"
    layers = "" if r.compressed_layers in (0, r.layers) else f" in {r.compressed_layers} of {r.layers} layers"
    speed = MISSING if result.tokens_per_second is None else f"{result.tokens_per_second:.1f} tokens/s"
    held = f" · {human_bytes(r.bytes)} held" if c.compressed.report.compressed_tokens else ""
    made = f"{r.cache_class} · {result.method} · weights {model.weights} on {model.device}"
    return f"{made} · {exact}{layers}{held} · {speed}"


def facts(c: Comparison) -> list[tuple[str, str]]:
    """Every figure of the run with its unit; quality and memory only when tokens were packed."""
    report = c.compressed.report
    rows = [
        ("Model", f"{c.model.name} ({c.model.hub_id}, weights {c.model.weights}, {c.model.dtype} on {c.model.device})"),
        ("Method", c.compressed.method),
        ("Prompt", f"{c.prompt_tokens:,} tokens"),
        ("Answers", f"{len(c.original.token_ids):,} and {len(c.compressed.token_ids):,} tokens"),
        ("Tokens packed / exact", f"{report.compressed_tokens:,} / {report.exact_tokens:,}"),
        ("Speed, original", number(c.original.tokens_per_second, 1, " tokens/s")),
        ("Speed, compressed", number(c.compressed.tokens_per_second, 1, " tokens/s")),
    ]
    if report.compressed_tokens == 0:
        return rows
    rows += [
        ("KV cache held", human_bytes(report.bytes)),
        ("16-bit baseline", human_bytes(report.full_precision_bytes)),
        ("Beside the baseline", cache_size(report)),
        ("Payload ratio (formula: 16 / bits of a code)", number(report.payload_ratio, 2, "x")),
        ("Bits per value, everything counted", number(report.bits_per_value, 2)),
    ]
    if c.heads:
        for name, part in (("packed positions", c.heads.packed), ("as served", c.heads.served)):
            rows += [
                (f"Heads at risk, {name}", percent(part.heads_at_risk_pct)),
                (f"Top-1 match, {name}", percent(part.top1_match_pct)),
                (f"Top-5 match, {name}", percent(part.top5_match_pct)),
                (f"Cosine of raw scores, {name}", number(part.cosine_scores, 4)),
                (f"Cosine of softmax weights, {name}", number(part.cosine_weights, 4)),
            ]
    if c.tokens:
        rows += [
            ("Mean KL(full ‖ compressed)", number(c.tokens.mean_kl, 4, " nats")),
            ("Same top token, teacher forced", percent(c.tokens.same_top_pct)),
        ]
    return rows
