"""Columns of tables on pages: what the catalogue of metrics says of their figures."""

import streamlit as st
from streamlit.elements.lib.column_types import ColumnConfig

from turboquant.records.metrics import BYTES, SMALL, SPEED, metric

_FORMATS = {SMALL: "%.4g", SPEED: "%.1f", ",.0f": "localized"}


def figure(name: str, head: str | None = None) -> ColumnConfig:
    """The column of a metric: heading with unit, digits, and what it means and which way is better as its help."""
    one = metric(name)
    form = "bytes" if one.unit == BYTES else _FORMATS.get(one.digits, f"%{one.digits}")
    return st.column_config.NumberColumn(head or one.head, format=form, help=one.help or None)


def figures(*names: str) -> dict[str, ColumnConfig]:
    """The columns of metrics in a table whose columns go by their short titles."""
    return {metric(name).column: figure(name) for name in names}
