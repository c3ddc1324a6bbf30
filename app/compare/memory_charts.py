"""Bytes that the caches hold."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from app.tab.verdict import cache_size, human_bytes
from app.ui.style import BASELINE, COMPRESSED, ORIGINAL, PARTS, Chart, layout, line
from turboquant.records.comparison import CacheReport, Comparison
from turboquant.records.metrics import metric
from turboquant.sizing import KVBytes

_UNIT = 2**20
BASELINE_16 = metric("full_precision_bytes").title
_PATTERNS = {"keys": "", "values": "/", "scales": "x", "exact": "\\", "spare": ".", "shared": "+", "states": "-"}
PART_WORDS = {
    "keys": "key codes",
    "values": "value codes",
    "scales": "scales and means",
    "exact": "exact tokens",
    "spare": "spare room",
    "shared": "shared tables",
    "states": "recurrent states",
}


def bytes_per_step(c: Comparison) -> Chart:
    """KV bytes after each token: both caches as held, and the 16-bit baseline."""
    steps = max(len(c.original.cache_bytes), len(c.compressed.cache_bytes))
    x = list(range(1, steps + 1))
    report = c.compressed.report
    states = report.state_bytes  # of a fixed size
    per_token = (report.full_precision_bytes - states) / report.tokens if report.tokens else 0.0
    start = report.tokens - len(c.compressed.cache_bytes)
    baseline = [states + per_token * (start + i) for i in x]
    table = pd.DataFrame(
        {
            "token": x,
            "original bytes": pd.array(_padded(c.original.cache_bytes, steps), dtype="Int64"),
            "compressed bytes": pd.array(_padded(c.compressed.cache_bytes, steps), dtype="Int64"),
            f"{BASELINE_16} bytes": pd.array([round(value) for value in baseline], dtype="Int64"),
        }
    )
    figure = go.Figure()
    original = [value / _UNIT for value in c.original.cache_bytes]
    compressed = [value / _UNIT for value in c.compressed.cache_bytes]
    figure.add_trace(line("Original, as held", x[: len(original)], original, ORIGINAL))
    figure.add_trace(line(BASELINE_16, x, [value / _UNIT for value in baseline], BASELINE, dash="dot"))
    figure.add_trace(line("Compressed, as held", x[: len(compressed)], compressed, COMPRESSED, dash="dash"))
    figure.update_traces(hovertemplate="%{y:.3f} MiB")
    layout(figure, xaxis_title="generated token", yaxis_title="MiB", yaxis_rangemode="tozero")
    held, full = human_bytes(report.bytes), human_bytes(report.full_precision_bytes)
    alt = (
        f"At the end the compressed cache holds {held}; the same tokens take {full} at 16 bit "
        f"and {human_bytes(c.original.report.bytes)} in the original, which holds {c.model.dtype}."
    )
    return Chart(figure, alt, table)


def _padded(values: list[int], length: int) -> list[int | None]:
    return [*values, *([None] * (length - len(values)))]


def parts(report: CacheReport | KVBytes) -> list[tuple[str, int]]:
    """What a compressed cache is made of, in bytes, measured or estimated."""
    found = [
        ("keys", report.key_bytes),
        ("values", report.value_bytes),
        ("scales", report.scale_bytes),
        ("exact", report.exact_bytes),
        ("spare", report.spare_bytes),
        ("shared", report.shared_bytes),
    ]
    return [*found, ("states", report.state_bytes)] if report.state_bytes else found


def part_bar(part: str, caches: Sequence[str], sizes: Sequence[float], **look: Any) -> go.Bar:
    """The share that one part has in the bars of some caches."""
    pattern = {"shape": _PATTERNS[part], "size": 7, "fillmode": "overlay", "fgcolor": "#ffffff", "solidity": 0.2}
    return go.Bar(
        y=caches,
        x=sizes,
        name=PART_WORDS[part],
        orientation="h",
        marker={"color": PARTS[part], "pattern": pattern},
        **look,
    )


def bytes_by_part(c: Comparison) -> Chart:
    """One bar a cache: the compressed one in its parts beside the 16-bit baseline."""
    report = c.compressed.report
    figure = go.Figure()
    for name, held in parts(report):
        if held:
            figure.add_trace(part_bar(name, ["Compressed"], [held / _UNIT], hovertemplate="%{x:.3f} MiB"))
    figure.add_trace(
        go.Bar(
            y=["16-bit"],
            x=[report.full_precision_bytes / _UNIT],
            name=BASELINE_16,
            orientation="h",
            marker={"color": BASELINE},
            hovertemplate="%{x:.3f} MiB",
        )
    )
    layout(figure, barmode="stack", hovermode="closest", xaxis_title="MiB", height=280)
    figure.update_yaxes(categoryorder="array", categoryarray=["Compressed", "16-bit"])
    rows = [(PART_WORDS[name], held) for name, held in parts(report)]
    rows += [("everything held", report.bytes), (BASELINE_16, report.full_precision_bytes)]
    if report.graph_bytes:
        rows.append(("captured decode steps, beside the cache", report.graph_bytes))
    table = pd.DataFrame(rows, columns=["part", "bytes"])
    name, most = max(parts(report), key=lambda part: part[1])
    total, full = human_bytes(report.bytes), human_bytes(report.full_precision_bytes)
    alt = (
        f"{total} held against {full} at 16 bit, {cache_size(report)}; "
        f"the largest part, {human_bytes(most)}, is {PART_WORDS[name]}."
    )
    if report.graph_bytes:
        alt += f" Its captured decode steps take {human_bytes(report.graph_bytes)} more, whatever the context."
    return Chart(figure, alt, table)
