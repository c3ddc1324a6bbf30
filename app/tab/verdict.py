"""A comparison in figures: their names, units and provenance lines. Plain text; the sentence is the library's."""

from collections.abc import Sequence
from typing import Literal

from turboquant.records.comparison import Comparison
from turboquant.records.metrics import human_bytes, metric
from turboquant.records.verdict import cache_size, quoted, verdict

__all__ = ["cache_size", "columns", "facts", "human_bytes", "measured", "provenance", "quoted", "verdict"]


def provenance(c: Comparison, side: Literal["original", "compressed"]) -> str:
    """What one answer was made with, measured in that run."""
    result, model = getattr(c, side), c.model
    r = result.report
    exact = f"{r.compressed_tokens:,} {metric('compressed_tokens').title}, {r.exact_tokens:,} exact"
    layers = "" if r.compressed_layers in (0, r.layers) else f" in {r.compressed_layers} of {r.layers} layers"
    speed = metric("tokens_per_second").said(result.tokens_per_second)
    held = f" · {human_bytes(r.bytes)} held" if c.compressed.report.compressed_tokens else ""
    made = f"{r.cache_class} · {result.method} · weights {model.weights_said} on {model.device}"
    return f"{made} · {exact}{layers}{held} · {speed}"


def measured(c: Comparison) -> dict[str, float | None]:
    """Every figure of a comparison by its name in records; None where it was not measured.

    Quality and memory are there only where tokens were packed.
    """
    original, compressed = c.original, c.compressed
    packed = compressed.report.compressed_tokens > 0
    found: dict[str, float | None] = {
        "prompt_tokens": c.prompt_tokens,
        "original_answer_tokens": len(original.token_ids),
        "answer_tokens": len(compressed.token_ids),
        "mean_kl": c.tokens.mean_kl if c.tokens else None,
        "same_top_pct": c.tokens.same_top_pct if c.tokens else None,
    }
    for part in ("packed", "served"):
        scores = getattr(c.heads, part) if c.heads else None
        for name in ("heads_at_risk_pct", "top1_match_pct", "top5_match_pct", "cosine_scores", "cosine_weights"):
            found[f"{part}_{name}"] = getattr(scores, name) if scores else None
    for name in ("bytes", "full_precision_bytes", "compression_ratio", "payload_ratio", "bits_per_value"):
        found[name] = getattr(compressed.report, name) if packed else None
    for name in ("tokens_per_second", "time_to_first_token_ms"):
        found |= {f"original_{name}": getattr(original, name), name: getattr(compressed, name)}
    return found


def columns(c: Comparison | None, names: Sequence[str]) -> dict[str, float | None]:
    """Figures of a comparison by their columns in tables and files; those of heads are over packed tokens alone."""
    found = measured(c) if c else {}
    return {metric(name).column: found.get(f"packed_{name}", found.get(name)) for name in names}


def facts(c: Comparison) -> list[tuple[str, str]]:
    """Every figure of the run with its unit; quality and memory only when tokens were packed."""
    report = c.compressed.report
    rows = [
        (
            "Model",
            f"{c.model.name} ({c.model.hub_id}, weights {c.model.weights_said}, {c.model.dtype} on {c.model.device})",
        ),
        ("Method", c.compressed.method),
        ("Tokens packed / exact", f"{report.compressed_tokens:,} / {report.exact_tokens:,}"),
        *([("Beside the baseline", cache_size(report))] if report.compressed_tokens else []),
    ]
    found = {name: value for name, value in measured(c).items() if value is not None}
    if found.get("compression_ratio", 1) < 1:  # said in words above
        del found["compression_ratio"]
    return rows + [(metric(name).heading, metric(name).said(value)) for name, value in found.items()]
