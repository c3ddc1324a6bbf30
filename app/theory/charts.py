"""The Theory page's figures. The sentence under each is made from the numbers that were just measured.

Theory is drawn in grey lines, told apart by their dash; what was measured has colour and markers.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from app.theory.request import Codebook, Coordinates, InnerProducts, RecordedCheck, Rotated, code_of
from app.ui.style import BASELINE, COMPRESSED, ORIGINAL, PARTS, RISK, Chart, layout
from turboquant.experiments.theory import COSINE, NEEDLES, NEIGHBOURS, TOLERANCE, Distortion, Theory
from turboquant.records.spread import Estimate

QUANTIZERS = {
    "mse": "MSE code, plain norm",
    "matched": "MSE code, matched length",
    "unbiased": "MSE code, unbiased scale",
    "prod_gaussian": "QJL, Gaussian S (paper)",
    "prod_orthogonal": "QJL, orthogonal S",
}
_LOOKS = {
    "mse": (COMPRESSED, "circle", "solid"),
    "matched": (PARTS["values"], "triangle-up", "dash"),
    "unbiased": (PARTS["shared"], "x", "dot"),
    "prod_gaussian": (RISK, "square", "solid"),
    "prod_orthogonal": (PARTS["scales"], "diamond", "dash"),
}
_AXIS = "coordinate, in units of 1/√d"


def rotation(lesson: Rotated) -> Chart:
    """One vector's coordinates before and after the rotation, one above the other on one scale."""
    channels = list(range(1, len(lesson.before) + 1))
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        shared_yaxes="all",
        vertical_spacing=0.16,
        subplot_titles=("before the rotation", "after the rotation"),
    )
    for row, (values, color) in enumerate(((lesson.before, ORIGINAL), (lesson.after, COMPRESSED)), start=1):
        bars = go.Bar(x=channels, y=values, marker={"color": color, "line": {"width": 0}}, showlegend=False)
        figure.add_trace(bars.update(hovertemplate="channel %{x}: %{y:.3f}<extra></extra>"), row=row, col=1)
    layout(figure, height=380, hovermode="closest", bargap=0)
    figure.update_xaxes(title_text="channel", row=2, col=1)
    largest = [max(map(abs, values)) for values in (lesson.before, lesson.after)]
    alt = (
        f"The largest coordinate went from {largest[0]:.2f} to {largest[1]:.2f} of the vector's length. With "
        f"{_bits(lesson.bits)} a coordinate, rounding loses {_share(lesson.lost_before)} of the squared length "
        f"of the vector as it was, and {_share(lesson.lost_after)} once it is rotated."
    )
    return Chart(figure, alt, pd.DataFrame({"channel": channels, "before": lesson.before, "after": lesson.after}))


def coordinates(lesson: Coordinates, dim: int) -> Chart:
    """Histogram of rotated coordinates against the exact density and its Gaussian limit."""
    figure = go.Figure(
        go.Bar(
            x=lesson.middles,
            y=lesson.heights,
            name="rotated coordinates (measured)",
            marker={"color": COMPRESSED, "opacity": 0.55, "line": {"width": 0}},
        )
    )
    figure.add_trace(_theory("exact density (theory)", lesson.grid, lesson.exact, "solid"))
    figure.add_trace(_theory("Gaussian limit (theory)", lesson.grid, lesson.gaussian, "dash"))
    figure.update_traces(hovertemplate="%{y:.3f}")
    layout(figure, height=320, bargap=0, xaxis_title=_AXIS, yaxis_title="density")
    alt = (
        f"{_share(lesson.far)} of {lesson.count:,} measured coordinates lie further out than two standard "
        f"deviations. The exact density for {dim} dimensions says {_share(lesson.far_exact)}, the Gaussian "
        f"limit {_share(lesson.far_gaussian)}."
    )
    table = pd.DataFrame({"coordinate": lesson.middles, "measured density": lesson.heights})
    table["exact density"] = np.interp(lesson.middles, lesson.grid, lesson.exact)
    table["Gaussian limit"] = np.interp(lesson.middles, lesson.grid, lesson.gaussian)
    return Chart(figure, alt, table)


def codebook(book: Codebook, value: float) -> Chart:
    """Levels and boundaries over the density, one coordinate's rounding, and the expected error of every level."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.65, 0.35])
    figure.add_trace(_theory("exact density (theory)", book.grid, book.density, "solid"), row=1, col=1)
    if len(book.levels) <= 32:
        for edge in book.boundaries:
            figure.add_vline(x=edge, line={"color": BASELINE, "width": 1, "dash": "dot"}, row=1, col=1)
    code = code_of(value, book)
    level, top = book.levels[code], max(book.density)
    figure.add_trace(_points("levels", book.levels, [0.0] * len(book.levels), COMPRESSED, "diamond"), row=1, col=1)
    rounding = go.Scatter(
        x=[value, level],
        y=[0.25 * top, 0.25 * top],
        name="your coordinate → its level",
        mode="lines+markers",
        line={"color": RISK, "width": 2},
        marker={"symbol": ["circle", "diamond"], "size": 10},
    )
    figure.add_trace(rounding, row=1, col=1)
    errors = [100 * error / book.expected for error in book.errors]
    bars = go.Bar(x=book.levels, y=errors, name="share of the expected error", marker={"color": BASELINE})
    figure.add_trace(bars.update(width=0.6 * _narrowest(book.levels)), row=2, col=1)
    layout(figure, height=430, hovermode="closest")
    figure.update_traces(hovertemplate="%{x:.3f}: %{y:.3f}")
    figure.update_xaxes(title_text=_AXIS, row=2, col=1)
    figure.update_yaxes(title_text="density", row=1, col=1)
    figure.update_yaxes(title_text="error", ticksuffix=" %", row=2, col=1)
    alt = (
        f"A coordinate of {value:.2f} is stored as code {code:0{book.bits}b} and read back as {level:.3f}, off by "
        f"{abs(value - level):.3f}. On average {_bits(book.bits)} lose {_share(book.expected)} "
        f"of the squared length; the two outermost of {len(book.levels)} levels hold "
        f"{_share((book.errors[0] + book.errors[-1]) / book.expected)} of that loss."
    )
    table = pd.DataFrame(
        {
            "code": [f"{i:0{book.bits}b}" for i in range(len(book.levels))],
            "level": book.levels,
            "from": [None, *book.boundaries],
            "to": [*book.boundaries, None],
            "probability, %": [100 * share for share in book.probability],
            "share of the expected error, %": errors,
        }
    )
    return Chart(figure, alt, table)


def distortion(
    found: Mapping[int, Distortion], expected: Mapping[int, Theory], bits: int, recorded: Sequence[RecordedCheck] = ()
) -> Chart:
    """Measured loss of squared length against bits, with the exact expectation and the paper's bounds."""
    figure = go.Figure()
    widths = list(expected)
    for name, field, dash in (
        ("upper bound, Theorem 1", "mse_upper", "dash"),
        ("exact expectation (theory)", "mse", "solid"),
        ("lower bound for any code, Theorem 3", "lower", "dot"),
    ):
        figure.add_trace(_theory(name, widths, [getattr(expected[width], field) for width in widths], dash))
    measured = {width: one.mse["mse"] for width, one in found.items()}
    figure.add_trace(_measured("measured now", measured, (COMPRESSED, "circle", "solid")).update(mode="markers"))
    if recorded:
        points = {check.bits: check.mse for check in recorded}
        squares = _measured("recorded", points, (ORIGINAL, "square-open", "solid"))
        figure.add_trace(squares.update(mode="markers", marker={"size": 15}))
    layout(figure, height=380, xaxis_title="bits a coordinate", yaxis_title="lost share of squared length")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    here, exact = measured[bits], expected[bits]
    z = here.z(exact.mse)
    words = "agrees with" if z < TOLERANCE else "differs from"
    alt = (
        f"At {_bits(bits)} the measured loss is {_estimate(here)}, which {words} the exact {exact.mse:.4g} "
        f"({z:.1f} standard errors off). It is {exact.mse_upper / here.mean:.2f} times below the upper bound and "
        f"{here.mean / exact.lower:.2f} times above the least that any code could lose."
    )
    rows = [_row(width, expected[width], measured.get(width)) for width in widths]
    table = pd.DataFrame(rows)
    if recorded:
        table["recorded"] = table["bits"].map({check.bits: check.mse.mean for check in recorded})
    return Chart(figure, alt, table)


def _row(bits: int, exact: Theory, here: Estimate | None) -> dict[str, Any]:
    return {
        "bits": bits,
        "measured now": here.mean if here else None,
        "standard error": here.standard_error if here else None,
        "exact expectation": exact.mse,
        "upper bound": exact.mse_upper,
        "lower bound": exact.lower,
    }


def inner_products(lesson: InnerProducts, bits: int, exact: Theory) -> Chart:
    """Estimated against true inner products, a line through the origin for each quantizer."""
    figure = go.Figure(_theory("no error", [-1, 1], [-1, 1], "dot"))
    for name, values in lesson.estimated.items():
        color, symbol, dash = _LOOKS[name]
        figure.add_trace(_points(QUANTIZERS[name], lesson.true, values, color, symbol).update(marker={"opacity": 0.7}))
        slope = lesson.slope[name]
        line = {"color": color, "width": 2, "dash": dash}
        ends = go.Scatter(x=[-1, 1], y=[-slope, slope], name=f"{QUANTIZERS[name]}: slope {slope:.3f}", line=line)
        figure.add_trace(ends.update(mode="lines", hoverinfo="skip"))
    layout(figure, height=420, hovermode="closest")
    figure.update_layout(xaxis_title="true inner product", yaxis_title="estimated from the codes")
    said = "; ".join(f"{QUANTIZERS[name]} {slope:.3f}" for name, slope in lesson.slope.items())
    alt = (
        f"Slope of the estimates at {_bits(bits)} (1 is unbiased): {said}. Theory says {exact.shrink:.3f} for the MSE "
        "code with plain norms and 1 for the unbiased ones."
    )
    return Chart(figure, alt, pd.DataFrame({"true": lesson.true, **lesson.estimated}).rename(columns=QUANTIZERS))


def gains(found: Distortion, exact: Theory) -> pd.DataFrame:
    """One row a quantizer: its mean gain with standard error, what theory says, and its error for such queries."""
    theory = {"mse": exact.shrink, "unbiased": 1.0, "prod_gaussian": 1.0, "prod_orthogonal": 1.0}
    return pd.DataFrame(
        [
            {
                "quantizer": label,
                "gain (1 = unbiased)": found.gain[name].mean,
                "± standard error": found.gain[name].standard_error,
                "gain, theory": f"{theory[name]:.4f}" if name in theory else "not stated",
                f"d · squared error, cosine {COSINE}": found.correlated[name].mean,
                "d · squared error, random query": found.inner_product[name].mean,
            }
            for name, label in QUANTIZERS.items()
        ]
    )


def price(found: Mapping[int, Distortion], expected: Mapping[int, Theory], bits: int) -> Chart:
    """Squared error of inner products with random queries against bits, with and without a QJL stage."""
    figure = go.Figure()
    rows: dict[str, Any] = {"bits": list(found)}
    for name in ("mse", "prod_gaussian", "prod_orthogonal"):
        values = {width: one.inner_product[name] for width, one in found.items()}
        theory = [getattr(expected[width], name) for width in expected]
        figure.add_trace(_theory("theory", list(expected), theory, _LOOKS[name][2]).update(showlegend=name == "mse"))
        figure.add_trace(_measured(QUANTIZERS[name], values, _LOOKS[name]).update(mode="markers"))
        rows[QUANTIZERS[name]] = [value.mean for value in values.values()]
        rows[f"{QUANTIZERS[name]}, theory"] = [getattr(expected[width], name) for width in found]
    layout(figure, height=340, xaxis_title="bits a coordinate, sign bit included", yaxis_title="d · mean squared error")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    here = found[bits].inner_product
    gaussian, orthogonal = (here[f"prod_{kind}"].mean / here["mse"].mean for kind in ("gaussian", "orthogonal"))
    alt = (
        f"At {_bits(bits)} a QJL stage with Gaussian S has {gaussian:.1f} times, with orthogonal S {orthogonal:.1f} "
        "times the squared error of an MSE code of the same size, for queries that have nothing to do with the key."
    )
    return Chart(figure, alt, pd.DataFrame(rows))


def recall(found: Mapping[int, Mapping[str, Estimate]], bits: int) -> Chart:
    """How often the key with the highest score stays the highest, by quantizer, against bits."""
    figure = go.Figure()
    rows: dict[str, Any] = {"bits": list(found)}
    for name, label in QUANTIZERS.items():
        values = {
            width: one[name].model_copy(
                update={"mean": 100 * one[name].mean, "standard_error": 100 * one[name].standard_error}
            )
            for width, one in found.items()
        }
        figure.add_trace(_measured(label, values, _LOOKS[name]))
        rows[f"{label}, %"] = [value.mean for value in values.values()]
    rows["full keys, %"] = [100 * one["full"].mean for one in found.values()]
    layout(figure, height=340, xaxis_title="bits a coordinate, sign bit included", yaxis_title="best key still first")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(ticksuffix=" %", rangemode="tozero")
    here = found[bits]
    alt = (
        f"At {_bits(bits)} the best of {NEEDLES * NEIGHBOURS} keys stays first in "
        f"{_share(here['matched'].mean)} of the cases with a matched MSE code, "
        f"{_share(here['prod_gaussian'].mean)} with QJL and Gaussian S, "
        f"{_share(here['prod_orthogonal'].mean)} with QJL and orthogonal S; full keys find it in "
        f"{_share(here['full'].mean)}."
    )
    return Chart(figure, alt, pd.DataFrame(rows))


def checks(recorded: Sequence[RecordedCheck]) -> pd.DataFrame:
    """Passed and total checks, a row for each dimension and a column for each number of bits."""
    table = pd.DataFrame([(c.dim, c.bits, f"{c.passed} of {c.total}") for c in recorded], columns=["d", "bits", "n"])
    wide = table.pivot(index="d", columns="bits", values="n")
    wide.columns = [_bits(int(bits)) for bits in wide.columns]
    return wide.reset_index(names="dimensions")


def _theory(name: str, x: Sequence[float], y: Sequence[float], dash: str) -> go.Scatter:
    return go.Scatter(x=x, y=y, name=name, mode="lines", line={"color": BASELINE, "width": 2, "dash": dash})


def _points(name: str, x: Sequence[float], y: Sequence[float], color: str, symbol: str) -> go.Scatter:
    return go.Scatter(x=x, y=y, name=name, mode="markers", marker={"color": color, "symbol": symbol, "size": 7})


def _measured(name: str, points: Mapping[int, Estimate], look: tuple[str, str, str]) -> go.Scatter:
    """Means with bars of one standard error."""
    color, symbol, dash = look
    return go.Scatter(
        x=list(points),
        y=[point.mean for point in points.values()],
        error_y={"array": [point.standard_error for point in points.values()], "width": 4, "thickness": 1.5},
        name=name,
        mode="lines+markers",
        line={"color": color, "width": 2, "dash": dash},
        marker={"symbol": symbol, "size": 9},
        hovertemplate="%{y:.4g}",
    )


def _narrowest(levels: Sequence[float]) -> float:
    return min(after - before for before, after in itertools.pairwise(levels))


def _bits(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def _share(fraction: float) -> str:
    return f"{100 * fraction:.3g}\N{NARROW NO-BREAK SPACE}%"


def _estimate(value: Estimate) -> str:
    return f"{value.mean:.4g} ± {value.standard_error:.1g} ({value.seeds} seeds)"
