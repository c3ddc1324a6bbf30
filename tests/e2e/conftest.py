"""A server started as a visitor's would be, a real browser, and what both kinds of browser tests do with them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "tests" / "artifacts"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SECONDS = 1000
expect.set_options(timeout=20 * SECONDS)  # other tests share the two cores
ENVIRONMENT = {"NO_COLOR": "1", "TURBOQUANT_DISCONNECT_GRACE_S": "1"}
IN_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
    pytest.mark.timeout(240),
]


def serve(log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """A server started as a visitor's would be, on a free port, until the caller is done; it must log no error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"port": port, "headless": "true", "fileWatcherType": "none"}
    flags = [f"--server.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "streamlit", "run", *flags]
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**environment, **ENVIRONMENT})
    try:
        wait_for_health(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the settings that nobody has changed."""
    yield from serve(tmp_path_factory.mktemp("server") / "log.txt", os.environ)


def wait_for_health(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            with urlopen(f"{url}/_stcore/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


def visit(
    browser: Browser, url: str, width: int = 1440, heading: str = "", color_scheme: Literal["light", "dark"] = "light"
) -> Page:
    """Open an address and wait for the page's heading. Tabs share what the browser has fetched of the app's code."""
    context = browser.contexts[0] if browser.contexts else browser.new_context()
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=color_scheme)
    page.set_default_timeout(60 * SECONDS)
    page.goto(url)
    expect(page.get_by_role("heading", level=1, name=heading or None).first).to_be_visible(timeout=30 * SECONDS)
    return page


def main(page: Page) -> Locator:
    """The part beside the sidebar; Streamlit names it otherwise where a chat box stands at its foot."""
    return page.locator('[data-testid="stMain"], [data-testid="stAppScrollToBottomContainer"]')


def wait_until(page: Page, condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, main(page).inner_text()[-1500:]
        page.wait_for_timeout(50)


def wait_until_still(page: Page, milliseconds: int = 300) -> None:
    """Wait until the page has changed nothing for so long, after two frames, and for ten seconds at most."""
    page.evaluate(
        """milliseconds => new Promise(resolve => {
            const done = () => { watch.disconnect(); clearTimeout(last); resolve(); };
            let quiet;
            const again = () => { clearTimeout(quiet); quiet = setTimeout(done, milliseconds); };
            const watch = new MutationObserver(again);
            const last = setTimeout(() => { clearTimeout(quiet); done(); }, 10000);
            watch.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
            requestAnimationFrame(() => requestAnimationFrame(again));
        })""",
        milliseconds,
    )


def shot(page: Page, name: str, *, whole: bool = True) -> None:
    """With SCREENSHOTS=1 a screenshot of the whole page, whose height the window takes for it; no test reads it."""
    if not os.environ.get("SCREENSHOTS"):
        return
    ARTIFACTS.mkdir(exist_ok=True)
    size = page.viewport_size
    assert size is not None
    if whole:
        height = main(page).evaluate("e => e.scrollHeight")
        page.set_viewport_size({"width": size["width"], "height": min(int(height) + 40, 7000)})
        wait_until_still(page)
    page.screenshot(path=ARTIFACTS / f"{name}.png")
    page.set_viewport_size(size)


def no_sideways_scroll(page: Page) -> bool:
    wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    inner = main(page).evaluate("e => [e.scrollWidth, e.clientWidth]")
    return bool(wide[0] <= wide[1] and inner[0] <= inner[1])
