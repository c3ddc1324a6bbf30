"""Charts: figure, summary and table tell the same, and colours can be read."""

import json
import tomllib
from pathlib import Path

import pytest

from app.compare import memory_charts as memory
from app.compare import token_charts as tokens
from app.heads import charts as heads
from app.ui import style
from app.ui.style import Chart
from tests.support.factory import HEADS, LAYERS, comparison

CONFIG = Path(__file__).resolve().parents[2] / ".streamlit" / "config.toml"
CHARTS = {
    "bytes_per_step": memory.bytes_per_step,
    "bytes_by_part": memory.bytes_by_part,
    "risk_map": heads.risk_map,
    "risk_per_step": heads.risk_per_step,
    "kl_per_token": tokens.kl_per_token,
    "probabilities": tokens.probabilities,
}


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_has_a_figure_a_sentence_and_a_table(name: str) -> None:
    chart: Chart = CHARTS[name](comparison())
    assert len(chart.table)
    assert chart.alt.endswith(".")
    assert chart.figure.data
    json.loads(chart.figure.to_json())


def test_bytes_add_up() -> None:
    c = comparison()
    chart = memory.bytes_by_part(c)
    held = {trace.name: trace.x[0] for trace in chart.figure.data}
    assert held["16-bit baseline"] == c.compressed.report.full_precision_bytes / 2**20
    rows = dict(zip(chart.table["part"], chart.table["bytes"], strict=True))
    assert rows["everything held"] == c.compressed.report.bytes
    assert rows["key codes"] == c.compressed.report.key_bytes


def test_bars_and_lines_differ_without_their_colours() -> None:
    bars = memory.bytes_by_part(comparison()).figure.data
    shapes = [bar.marker.pattern.shape for bar in bars if bar.name != "16-bit baseline"]
    assert len(set(shapes)) == len(shapes)
    lines = memory.bytes_per_step(comparison()).figure.data
    assert len({line.line.dash for line in lines}) == 3


def test_the_baseline_ends_at_the_reported_figure() -> None:
    c = comparison()
    table = memory.bytes_per_step(c).table
    assert table["16-bit baseline bytes"].iloc[-1] == c.compressed.report.full_precision_bytes


def test_the_risk_map_is_layers_by_heads() -> None:
    chart = heads.risk_map(comparison())
    assert (len(chart.figure.data[0].z), len(chart.figure.data[0].z[0])) == (HEADS, LAYERS)
    assert len(chart.table) == HEADS * LAYERS
    first = chart.table.iloc[0]
    assert first["steps at risk"] == pytest.approx(25.0)
    assert (first["layer"], first["head"]) == (2, 3)
    assert "layer 2, head 3" in chart.alt


def test_missing_values_are_no_numbers() -> None:
    chart = heads.risk_per_step(comparison())
    assert chart.figure.data[0].y[0] is None
    assert chart.table["at risk, packed"].isna().iloc[0]


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def faded(color: str, background: str) -> str:
    """Captions are drawn at 60 of 100 parts of the text colour."""
    pairs = [(int(color[i : i + 2], 16), int(background[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.6 * a + 0.4 * b):02x}" for a, b in pairs)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_can_be_read_in_both_modes(mode: str) -> None:
    theme = tomllib.loads(CONFIG.read_text())["theme"][mode]
    background = theme["backgroundColor"]
    for name in ("blueTextColor", "violetTextColor", "orangeTextColor", "grayTextColor", "textColor", "linkColor"):
        assert contrast(theme[name], background) >= 4.5, name
    for name in ("blue", "violet", "orange"):
        assert contrast(theme[f"{name}TextColor"], theme[f"{name}BackgroundColor"]) >= 4.5, name
        assert contrast(theme["textColor"], theme[f"{name}BackgroundColor"]) >= 4.5, name
    assert contrast(theme["primaryColor"], background) >= 4.5  # the words of what is selected
    assert contrast(faded(theme["textColor"], background), background) >= 4.5
    for color in (style.ORIGINAL, style.COMPRESSED, style.BASELINE, style.RISK):
        assert contrast(color, background) >= 3.0, color
