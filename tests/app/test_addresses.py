"""Any address of any page opens: what cannot be used is left at its default, and no page shows an exception."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from tests.support.bench import MAIN
from tests.support.process import ROOT

PAGES = sorted(path.stem for path in (ROOT / "pages").glob("*.py"))
SOURCES = [*(ROOT / "app").rglob("*.py"), *(ROOT / "pages").glob("*.py")]
NAMED = {key for path in SOURCES for key in re.findall(r"key=\"([a-z_]+)\"", path.read_text())}
MADE = {"prompt", "run", "example", "heads_run", "heads_head", "heads_position", "mem_keys", "mem_values"}
KEYS = sorted(NAMED | MADE)
HOSTILE = ["", "-1", "0", "NaN", "1e999", "9" * 30, "true", "None", "[]", "<b>x</b>", "\x00", "\u202e", "x" * 5000]
USABLE = ["1", "3", "0.5", "turboquant:bits=3", "kivi", "smollm2-135m", "2K", "1,2,3", "compare", "layer 1", "same"]
VALUES = st.sampled_from(HOSTILE + USABLE) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
ADDRESSES = st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(VALUES, max_size=3), min_size=1, max_size=8)

FEW = settings(max_examples=6, deadline=None, suppress_health_check=[*HealthCheck])
MANY = settings(FEW, max_examples=400, derandomize=False, database=None, print_blob=True)


def open_any(profile: settings) -> None:
    """Open pages by as many addresses as the profile says."""

    @profile
    @given(st.sampled_from(PAGES), ADDRESSES)
    def opens(name: str, address: dict[str, str | list[str]]) -> None:
        page = AppTest.from_file(MAIN, default_timeout=120)
        for key, value in address.items():
            page.query_params[key] = value
        page.switch_page(f"../pages/{name}.py").run()
        assert not page.exception, page.exception[0].message

    opens()


@pytest.mark.usefixtures("page")
def test_any_address_opens() -> None:
    open_any(FEW)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("page")
def test_hundreds_of_addresses_open() -> None:
    open_any(MANY)
