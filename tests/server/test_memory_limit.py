"""A server in as much memory as Streamlit Community Cloud gives; what is written about that is what was recorded."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.server.memory_limit import MemoryLimit, MemoryLimitBench, measure, table
from tests.support.process import ROOT

GUIDE = ROOT / "docs" / "operator.md"
FILL = "room = bytearray(300 * 2**20)\nroom[::4096] = bytes([1]) * len(room[::4096])\nprint('it fits')"


@pytest.fixture
def limit() -> Iterator[MemoryLimit]:
    try:
        with MemoryLimit(200) as limit:
            yield limit
    except (LookupError, OSError) as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")


@pytest.mark.nightly
def test_the_limit_is_one(limit: MemoryLimit) -> None:
    done = subprocess.run([*limit.before, sys.executable, "-c", FILL], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-9, "")
    assert limit.kills() == 1


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_compares_end_in_the_memory_of_community_cloud(limit: MemoryLimit) -> None:
    record = measure()
    print(record.model_dump_json(indent=1))
    assert [start.converts for start in record.starts] == [True, False]
    assert record.prompt_tokens[1] > 700
    assert max(max(start.rss_mib) for start in record.starts) < record.limit_mib


def test_the_operators_table_is_the_newest_record() -> None:
    record = MemoryLimitBench.model_validate_json(
        (ROOT / "results" / "memory-limit.jsonl").read_text().splitlines()[-1]
    )
    guide = GUIDE.read_text()
    assert table(record) in guide
    for name, value in record.settings.items():
        assert f'\n{name} = "{value}"\n' in guide
