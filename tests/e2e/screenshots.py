"""Take the screenshots of README and docs/guide.md anew: `.venv/bin/python -m tests.e2e.screenshots [name ...]`.

A server is started, a real browser opens each page, and the picture goes to assets/. Prompts and Session run the
built-in model first, which takes a minute or two; all other pages show what ships with the app.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.conftest import CHROMIUM, FLAGS, ROOT, SECONDS, main, serve, visit, wait_until_still

ASSETS = ROOT / "assets"
WIDTH = 1290
LONG = 1800 * SECONDS


def nothing(page: Page) -> None:
    """Show the page as it opens."""


def finished(page: Page) -> None:
    """Wait for the work that was just begun."""
    at_work = page.get_by_test_id("stSidebar").get_by_text("is at work")
    expect(at_work).to_be_visible(timeout=60 * SECONDS)
    expect(at_work).to_have_count(0, timeout=LONG)


def run_prompts(page: Page) -> None:
    """Run the example prompts."""
    page.get_by_role("button", name="Run the set").click()
    finished(page)


def hold_session(page: Page) -> None:
    """Hold a conversation of two turns."""
    page.get_by_role("button", name="Send this opening").click()
    finished(page)
    page.get_by_test_id("stChatInput").get_by_role("textbox").fill("Go on: what does she decide, and why?")
    page.keyboard.press("Enter")
    finished(page)


@dataclass(frozen=True)
class Shot:
    """A picture: the address it shows, what is done first, where it begins, and how high it is in pixels."""

    name: str
    address: str
    height: int
    before: Callable[[Page], None] = nothing
    begin: str = ""
    sidebar: bool = False


SHOTS = (
    Shot("compare", "compare", 1450, sidebar=True),
    Shot("guide/compare-charts", "compare", 1230, begin="Tokens of the original answer"),
    Shot("guide/prompts", "prompts?tokens=24", 1140, run_prompts),
    Shot("guide/session", "session?tokens=48&chat_opening=A+story+to+go+on+with", 1140, hold_session),
    Shot("guide/heads", "heads", 1140),
    Shot("guide/memory", "memory", 1060),
    Shot("guide/theory", "theory", 1060),
    Shot("guide/methods", "methods", 1140),
    Shot("guide/seeds", "seeds", 1060),
    Shot("guide/needle", "needle", 1140),
    Shot("guide/benchmarks", "benchmarks", 1060),
    Shot("guide/runs", "runs", 900),
)


def settled(page: Page) -> None:
    """Wait until everything is drawn."""
    page.wait_for_timeout(500)
    for unfinished in ("stStatusWidget", "stSkeleton"):
        expect(page.get_by_test_id(unfinished)).to_have_count(0, timeout=60 * SECONDS)
    wait_until_still(page)


def take(browser: Browser, server: str, wanted: Shot) -> None:
    """Open the page and write its picture, in 256 colours."""
    width = 1600 if wanted.sidebar else WIDTH
    page = visit(browser, f"{server}/{wanted.address}", width, color_scheme="light")
    if wanted.sidebar:
        expect(page.get_by_text("Ready")).to_be_visible(timeout=LONG)
    settled(page)
    wanted.before(page)
    settled(page)
    page.set_viewport_size({"width": width, "height": 7000 if wanted.begin else wanted.height + 80})
    settled(page)
    page.mouse.move(0, 0)
    main(page).evaluate("e => { e.scrollTop = 0 }")
    wait_until_still(page)
    box = main(page).bounding_box()
    assert box is not None
    first = main(page).get_by_text(wanted.begin) if wanted.begin else page.get_by_role("heading", level=1)
    start = first.first.bounding_box()
    assert start is not None
    left, top = (0.0, 0.0) if wanted.sidebar else (box["x"] + 40, start["y"] - (8 if wanted.begin else 24))
    clip = {"x": left, "y": top, "width": box["x"] + box["width"] - left - 40, "height": wanted.height}
    path = ASSETS / f"{wanted.name}.png"
    path.parent.mkdir(exist_ok=True)
    page.screenshot(path=path, clip=clip)
    page.close()
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    names = sys.argv[1:]
    chosen = [one for one in SHOTS if not names or Path(one.name).name in names]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        started = contextmanager(serve)(Path(folder) / "log.txt", os.environ)
        with started as server:
            browser = play.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
            for one in chosen:
                take(browser, server, one)
            browser.close()
