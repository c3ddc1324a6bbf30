"""A hundred sessions against one engine lose nothing; what is written about that is what was recorded."""

import re

import pytest

from tests.server.load import LoadBench, latency, measure
from tests.server.process import ROOT

RECORDS = ROOT / "results" / "load.jsonl"
MAX_GROWTH_MIB = 30


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_hundred_sessions_lose_nothing() -> None:
    record, lost = measure(sessions=100, waves=2, arrive_s=60.0, visits=2)
    print(record.model_dump_json(indent=1))
    assert not lost
    assert record.runs == 40
    assert record.came_back == 20
    assert record.growth_mib_per_100_sessions is not None
    assert record.growth_mib_per_100_sessions < MAX_GROWTH_MIB


def test_the_operators_table_is_the_newest_record() -> None:
    record = LoadBench.model_validate_json(RECORDS.read_text().splitlines()[-1])
    page = (ROOT / "docs" / "operator.md").read_text()
    table = page[page.index("<!-- load -->") : page.index("<!-- end of load -->")]
    assert f"commit {record.environment.commit}" in table
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", table, flags=re.MULTILINE))
    assert rows["sessions a wave, waves"] == f"{record.sessions}, {record.waves}"
    assert rows["runs taken, lost"] == f"{record.runs}, {record.lost}"
    assert rows["refusals read and asked again"] == str(record.refused)
    assert rows["growth for 100 sessions, MiB"] == str(record.growth_mib_per_100_sessions)
    for name, label in LABELS.items():
        times = getattr(record, name)
        assert rows[label] == f"{times.median:.2f}, {times.p95:.2f}, {times.worst:.2f} ({times.count})", label


LABELS = {
    "first_element": "first element",
    "first_run": "first run of the page",
    "change": "a changed setting",
    "burst": "a changed setting, all sessions at once",
    "run": "a run, from click to result",
    "idle_first_paint": "browser: first paint, nobody else there",
    "first_paint": "browser: first paint, under the load",
    "heading": "browser: heading, under the load",
}


def test_latency_of_known_times() -> None:
    times = latency([float(value) for value in range(1, 101)])
    assert (times.count, times.median, times.p95, times.worst) == (100, 50.5, 95.05, 100.0)
