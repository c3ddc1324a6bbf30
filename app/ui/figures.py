"""A chart on the page: title, figure, its takeaway in words, its table and its downloads one click away."""

import streamlit as st

from app.ui.page import Tag
from app.ui.page import tag as show_tag
from app.ui.style import Chart

_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"]}


def show(title: str, chart: Chart, key: str, *, help: str | None = None, tag: Tag | None = None) -> None:
    """Draw a chart with its table twin. `key` is unique on the page."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**{title}**", help=help, width="content")
        if tag is not None:
            show_tag(tag)
    st.plotly_chart(chart.figure, key=f"chart_{key}", config=_CONFIG, alt=chart.alt)
    st.caption(chart.alt)
    table = st.expander("Show as a table", key=f"table_{key}", icon=":material/table_rows:", on_change="rerun")
    if table.open:
        with table:
            st.dataframe(chart.table, hide_index=True, alt=chart.alt, height=280)
            with st.container(horizontal=True):
                st.download_button(
                    "Table as CSV",
                    lambda: chart.table.to_csv(index=False),
                    f"{key}.csv",
                    "text/csv",
                    on_click="ignore",
                    key=f"csv_{key}",
                )
                st.download_button(
                    "Figure as HTML",
                    lambda: chart.figure.to_html(include_plotlyjs=True, full_html=True),
                    f"{key}.html",
                    "text/html",
                    on_click="ignore",
                    key=f"html_{key}",
                )
