"""A hundred sessions against one engine lose nothing; what is written about that is what was recorded."""

import pytest

from tests.server.load import LoadBench, latency, measure, table
from tests.support.process import ROOT

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


def test_the_table_is_the_newest_record() -> None:
    record = LoadBench.model_validate_json(RECORDS.read_text().splitlines()[-1])
    assert table(record) in (ROOT / "docs" / "endurance.md").read_text()


def test_latency_of_known_times() -> None:
    times = latency([float(value) for value in range(1, 101)])
    assert (times.count, times.median, times.p95, times.worst) == (100, 50.5, 95.05, 100.0)
