"""A model that is a stand-in, so that each state of queue and page can be held still, and looks at a page."""

import html
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from streamlit.testing.v1 import AppTest

from app.compare.request import CompareRequest
from app.engine.contract import Progress
from app.engine.job import Job
from app.tab import state
from tests.support.factory import comparison
from turboquant.records.comparison import Comparison
from turboquant.run.compare import Event

MAIN = str(Path(__file__).resolve().parents[2] / "app" / "main.py")


@dataclass
class Bench:
    """A loader and a runner that do what the test tells them."""

    load_error: BaseException | None = None
    run_error: BaseException | None = None
    hold_load: threading.Event = field(default_factory=threading.Event)
    hold_run: threading.Event = field(default_factory=threading.Event)
    result: Callable[[str, str], Any] = lambda prompt, method: comparison(prompt=prompt, method=method)
    loads: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    resident: int = 0
    most_resident: int = 0

    def __post_init__(self) -> None:
        self.hold_load.set()
        self.hold_run.set()

    def load(self, name: str, *, weights: str, progress: Progress) -> Any:
        self.loads.append(name)
        progress(0.4, f"Reading {name}")
        while not self.hold_load.wait(0.02):
            progress(0.5, f"Reading {name}")
        if self.load_error is not None:
            raise self.load_error
        return _Model(self, weights)

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        """Stream four words on each side of every item, wait for `hold_run`, and add what `result` makes."""
        for item in job.pending:
            prompts, methods = _asked(job)
            self.served.append(prompts[item])
            if self.run_error is not None:
                raise self.run_error
            job.begin_item(item)
            self._speak(job)
            prompt, stopped = prompts[item], False
            while not (stopped or self.hold_run.wait(0.02)):
                stopped = cancelled()
            made = [_half(prompt, method) if stopped else self.result(prompt, method) for method in methods]
            job.add(item, tuple(made) if isinstance(job.request, CompareRequest) else made[0])
            if stopped or yielding():
                return

    def _speak(self, job: Job) -> None:
        text = ""
        for step in range(1, 5):
            text += f" word{step}"
            for side in range(job.request.sides):
                name: Any = "compressed" if side else "original"
                job.publish(Event("token", name, text, step, 1000 * step, number=max(0, side - 1)))


def _half(prompt: str, method: str) -> Comparison:
    return comparison((" half",), (" half",), finish="cancelled", measured=False, prompt=prompt, method=method)


def _asked(job: Job) -> tuple[list[str], list[str]]:
    """The prompt of every item, or what stands for it, and the methods."""
    request: Any = job.request
    if hasattr(request, "cells"):
        return [str(cell) for cell in request.cells], ["turboquant:bits=4"]
    prompts = list(request.prompts) if hasattr(request, "prompts") else [request.prompt]
    methods = (
        list(request.methods) if hasattr(request, "methods") else [getattr(request, "method", "turboquant:bits=4")]
    )
    return prompts, methods


class _Model(SimpleNamespace):
    def __init__(self, bench: Bench, weights: str) -> None:
        super().__init__(weights="fp32" if weights == "auto" else weights, device="cpu")
        self._bench = bench
        bench.resident += 1
        bench.most_resident = max(bench.most_resident, bench.resident)

    def __del__(self) -> None:
        self._bench.resident -= 1


def opened(page: AppTest, name: str, **link: object) -> AppTest:
    """A page from a cold link."""
    for key, value in link.items():
        page.query_params[key] = value if isinstance(value, list) else str(value)
    page.switch_page(f"../pages/{name}.py").run()
    assert not page.exception
    return page


def said(page: AppTest) -> str:
    """The words on a page."""
    parts = [*page.markdown, *page.caption, *page.info, *page.warning, *page.error, *page.subheader, *page.text]
    return html.unescape("\n".join(str(part.value) for part in parts)).replace("\u200b", "")


def newest(page: AppTest) -> Any:
    """The newest job of the page's tab."""
    return state.engine().job(page.session_state["session_id"])


def ended(page: AppTest) -> AppTest:
    """The page when its job has ended."""
    until(lambda: not newest(page).live)
    page.run()
    assert not page.exception
    return page


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
