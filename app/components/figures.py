"""A chart on the page: title, figure, its takeaway in words, and its table one click away."""

import streamlit as st

from app.charts.style import Chart

_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"]}


def show(title: str, chart: Chart, key: str, *, help: str | None = None) -> None:
    """Draw a chart with its table twin. `key` is unique on the page."""
    st.markdown(f"**{title}**", help=help)
    st.plotly_chart(chart.figure, key=f"chart_{key}", config=_CONFIG, alt=chart.alt)
    st.caption(chart.alt)
    table = st.expander("Show as a table", key=f"table_{key}", icon=":material/table_rows:", on_change="rerun")
    if table.open:
        table.dataframe(chart.table, hide_index=True, alt=chart.alt, height=280)
