"""The Theory page's widgets and figures. Each figure is measured when it is drawn; equal settings are measured once."""

from collections.abc import Sequence

import streamlit as st

from app.tab import state
from app.tab.requests import RequestError
from app.theory import charts
from app.theory import request as lessons
from app.theory.request import Setting
from app.ui import figures, page
from app.ui.definitions import GAIN, LOST_LENGTH, PRODUCT_ERROR, RECALL
from app.ui.panes import escape
from turboquant.experiments.theory import Distortion
from turboquant.quant.codebook import MAX_BITS
from turboquant.report.summary import measured_on

_MORE = "theory_more"
_measured_once = st.cache_data(max_entries=512, show_spinner=False)
_rotate = _measured_once(lessons.rotate)
_coordinates = _measured_once(lessons.coordinates)
_codebook = _measured_once(lessons.codebook)
_distortion = _measured_once(lessons.distortion)
_recall = _measured_once(lessons.recall)
_inner_products = _measured_once(lessons.inner_products)


def controls() -> Setting:
    """Draw what all figures share, at the bottom of the window, and return what is set."""
    default = Setting()
    bar = st.bottom.container(horizontal=True, wrap=False, gap="xsmall", key="theory_controls")

    def chosen(name: str, label: str, options: Sequence[int], width: int) -> object:
        start = options.index(getattr(default, name))
        return bar.selectbox(label, options, start, key=f"theory_{name}", bind="query-params", width=width)

    dim = chosen("dim", "Dimensions", lessons.DIMS, 90)
    bits = chosen("bits", "Bits", range(1, MAX_BITS + 1), 70)
    vectors = chosen("vectors", "Vectors", lessons.VECTORS, 85)
    seed = chosen("seed", "Seed", range(lessons.MAX_SEED + 1), 75)
    try:
        return lessons.check_setting(dim, bits, vectors, seed)
    except RequestError as error:
        st.warning(f"{escape(str(error))} The defaults are shown instead.")
        return default


def rotation(setting: Setting) -> None:
    """Figure 1: a spiky vector before and after a random rotation."""
    row = st.container(horizontal=True)
    kind = row.segmented_control(
        "Large channels",
        list(lessons.SPIKES),
        format_func=lambda kind: lessons.SPIKES.get(kind, kind),
        default="outlier",
        required=True,
        key="theory_vector",
        bind="query-params",
    )
    name = row.segmented_control(
        "Rotation",
        list(lessons.ROTATIONS),
        default="random orthogonal",
        required=True,
        key="theory_rotation",
        bind="query-params",
        help="The paper draws a random orthogonal matrix; the recommended recipe takes a Hadamard matrix with random "
        "signs, which needs fewer operations.",
    )
    lesson = _rotate(kind or "outlier", lessons.ROTATIONS.get(name, "qr"), setting.dim, setting.bits, setting.seed)
    figures.show("One vector, before and after", charts.rotation(lesson), "theory_rotation", tag="measured")


def coordinates(setting: Setting) -> None:
    """Figure 2: where rotated coordinates lie, against the exact density and the Gaussian."""
    kind = st.session_state.get("theory_vector")
    lesson = _coordinates(kind if kind in lessons.SPIKES else "outlier", setting.dim, setting.vectors, setting.seed)
    chart = charts.coordinates(lesson, setting.dim)
    figures.show("Coordinates of many rotated vectors", chart, "theory_density", tag="measured")


@st.fragment
def codebook(setting: Setting) -> None:
    """Figure 3: levels and boundaries, one coordinate's rounding, and the expected error of every level."""
    value = st.slider(
        "A coordinate to round, in units of 1/√d",
        -3.0,
        3.0,
        0.6,
        0.05,
        key="theory_value",
        bind="query-params",
    )
    value = min(max(float(value), -3.0), 3.0)
    chart = charts.codebook(_codebook(setting.bits, setting.dim), value)
    figures.show("The codebook, and one coordinate's rounding", chart, "theory_codebook", tag="estimated")


def distortion(setting: Setting) -> None:
    """Figure 4: the measured loss against exact theory and the paper's bounds; more of it on demand."""
    recorded = [check for check in _recorded() if check.dim == setting.dim]
    more = st.session_state.get(_MORE) == (setting.dim, setting.seed)
    found = _with_more(setting) if more else _ladder(setting)
    chart = charts.distortion(found, lessons.expectations(setting.dim), setting.bits, recorded)
    figures.show("Lost squared length against bits", chart, "theory_distortion", help=LOST_LENGTH, tag="measured")
    if recorded:
        _recorded_on()
    st.button(
        "Measure with more vectors",
        key="theory_more_button",
        icon=":material/biotech:",
        disabled=more,
        on_click=_ask_for_more,
        args=(setting.dim, setting.seed),
        help=f"{lessons.MORE_SEEDS} seeds of {lessons.MORE_VECTORS} vectors at 1 to 8 bits. It takes seconds.",
    )


def _ask_for_more(dim: int, seed: int) -> None:
    st.session_state[_MORE] = (dim, seed)


def _ladder(setting: Setting) -> dict[int, Distortion]:
    """Everything about errors at the bit widths that are measured live."""
    widths = lessons.measured_bits(setting.dim, setting.bits)
    return {bits: _distortion(setting.dim, bits, setting.vectors, setting.seed) for bits in widths}


def _with_more(setting: Setting) -> dict[int, Distortion]:
    """The long measurement, one bit width after the other, so that it can be left at any time."""
    found: dict[int, Distortion] = {}
    progress = st.empty()
    for bits in range(1, MAX_BITS + 1):
        progress.progress((bits - 1) / MAX_BITS, f"Measuring codes of {bits} bits")
        found[bits] = _distortion(setting.dim, bits, lessons.MORE_VECTORS, setting.seed, lessons.MORE_SEEDS)
    progress.empty()
    return found


@st.fragment
def inner_products(setting: Setting) -> None:
    """Figure 5: estimated against true inner products, and every quantizer's gain."""
    others = [name for name in charts.QUANTIZERS if name != "mse"]
    other = st.segmented_control(
        "Beside the MSE code",
        others,
        format_func=lambda name: charts.QUANTIZERS.get(name, name),
        default="prod_gaussian",
        required=True,
        key="theory_quantizer",
        bind="query-params",
    )
    lesson = _inner_products(setting, ("mse", other if other in others else "prod_gaussian"))
    exact = lessons.expectations(setting.dim)[setting.bits]
    chart = charts.inner_products(lesson, setting.bits, exact)
    figures.show("Estimated against true inner products", chart, "theory_products", help=GAIN, tag="measured")
    found = _distortion(setting.dim, setting.bits, setting.vectors, setting.seed)
    table = charts.gains(found, exact)
    digits = st.column_config.NumberColumn(format="%.4f")
    st.dataframe(
        table,
        column_config={name: digits for name in table.select_dtypes("number")},
        hide_index=True,
        alt="Gain and error of every quantizer at the chosen number of bits",
    )


def price(setting: Setting) -> None:
    """Figure 6: the noise that QJL adds, and how often the best key stays the best."""
    left, right = st.columns(2)
    chart = charts.price(_ladder(setting), lessons.expectations(setting.dim), setting.bits)
    with left:
        figures.show("Error of inner products", chart, "theory_price", help=PRODUCT_ERROR, tag="measured")
    widths = lessons.measured_bits(setting.dim, setting.bits)
    found = {bits: _recall(setting.dim, bits, setting.seed) for bits in widths}
    chart = charts.recall(found, setting.bits)
    with right:
        figures.show("Is the best key still first?", chart, "theory_recall", help=RECALL, tag="measured")
    methods = page.PAGES / "methods.py"
    if methods.exists():
        st.page_link(methods, label="Methods: the recipes on a real model", icon=":material/scatter_plot:")


def recorded() -> None:
    """The recorded validation: how many of its checks passed, by dimension and bits."""
    checks = _recorded()
    if not checks:
        page.empty("No recorded validation ships with this copy. `turboquant theory` makes one.")
        return
    passed, total = sum(check.passed for check in checks), sum(check.total for check in checks)
    worst = max(check.largest_z for check in checks)
    st.markdown(
        f"**{passed:,} of {total:,}** checks passed; the furthest measured value lies {worst:.1f} standard errors from "
        "its theory."
    )
    _recorded_on()
    st.dataframe(charts.checks(checks), hide_index=True, alt="Checks passed, by dimensions and bits")


def _recorded() -> list[lessons.RecordedCheck]:
    return lessons.recorded_checks(state.recorded("validate"))


def _recorded_on() -> None:
    """Say where and when the recorded validation was measured."""
    page.tag("recorded")
    st.caption(escape(measured_on(record.environment for record in state.recorded("validate"))))
