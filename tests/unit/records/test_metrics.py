"""The catalogue of metrics: names, digits and definitions."""

import pytest

from turboquant.records.metrics import METRICS, NONE, metric
from turboquant.report.tables import COLUMNS


def test_labels_are_told_apart_and_definitions_are_sentences() -> None:
    labels = [one.label for one in METRICS.values()]
    assert len(set(labels)) == len(labels)
    assert all(one.definition.endswith(".") for one in METRICS.values() if one.definition)


@pytest.mark.parametrize("name", sorted({name for names in COLUMNS.values() for name in names} & set(METRICS)))
def test_figures_of_tables_are_written_with_their_digits(name: str) -> None:
    assert metric(name).text(None) == NONE
    assert float(metric(name).text(0.0)) == 0
    assert float(metric(name).text(12.0)) == 12


@pytest.mark.parametrize(
    ("name", "label", "value", "shown"),
    [
        ("encode_step_ms", "encode step, ms", 1.234, "1.23"),
        ("peak_bytes", "peak, bytes", 1234567.0, "1,234,567"),
        ("agreed_pct", "agreed, %", 12.34, "12.3"),
        ("kl_max", "kl max", 0.00012, "1.2e-04"),
        ("needle_rank_p90", "needle rank p90", 12.0, "12"),
        ("seconds", "seconds", 12345.0, "12,345"),
    ],
)
def test_what_is_not_listed_is_named_and_written_by_its_ending(name: str, label: str, value: float, shown: str) -> None:
    assert metric(name).label == label
    assert metric(name).text(value) == shown
