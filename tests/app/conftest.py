"""The app with stand-ins behind it. What imports PyTorch is imported by the fixture that needs it."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from streamlit.testing.v1 import AppTest

    from app.engine.engine import Engine
    from tests.support.bench import Bench
    from tests.support.cells import Cells


@pytest.fixture
def bench() -> Iterator["Bench"]:
    from tests.support.bench import Bench

    bench = Bench()
    yield bench
    bench.hold_load.set()
    bench.hold_run.set()


@pytest.fixture
def engine(bench: "Bench") -> Iterator["Engine"]:
    from app.engine.engine import Engine

    engine = Engine(
        bench.load, bench.run, is_expected=lambda error: isinstance(error, LookupError), max_queue=3, grace_s=0.1
    )
    yield engine
    engine.close()


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[["Engine"], "AppTest"]]:
    """Makes the app with an engine behind it; recorded runs are left out."""
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    from app.tab import state
    from tests.support.bench import MAIN

    def app(engine: "Engine") -> AppTest:
        monkeypatch.setattr(state, "engine", lambda: engine)
        monkeypatch.setattr(state, "recordings", lambda: [])
        return AppTest.from_file(MAIN, default_timeout=60)

    st.cache_resource.clear()
    yield app
    st.cache_resource.clear()


@pytest.fixture
def page(engine: "Engine", serving: Callable[["Engine"], "AppTest"]) -> "AppTest":
    """The Compare page with the stand-in engine behind it."""
    return serving(engine)


@pytest.fixture
def measuring(cells: "Cells", serving: Callable[["Engine"], "AppTest"]) -> Iterator["AppTest"]:
    """The app with the test's `cells` behind it; nothing is taken from a cache of results."""
    from app.engine.engine import Engine

    engine = Engine(cells.load, cells.run, max_queue=3, grace_s=0.1, max_cached=0)
    yield serving(engine)
    cells.let()
    engine.close()
