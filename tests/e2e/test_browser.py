"""The app as people meet it: a real server, a real browser, the real built-in model."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "tests" / "artifacts"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SECONDS = 1000
expect.set_options(timeout=20 * SECONDS)  # other tests share the two cores
ENVIRONMENT = {"NO_COLOR": "1", "TURBOQUANT_DISCONNECT_GRACE_S": "1"}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server started as a visitor's would be, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "streamlit", "run", "--server.port", str(port), "--server.headless", "true"]
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | ENVIRONMENT)
    try:
        wait_for_health(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


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


def visit(browser: Browser, url: str, width: int = 1440, **options: Any) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.set_default_timeout(60 * SECONDS)
    page.goto(url)
    expect(page.get_by_role("heading", name="Same prompt, two caches")).to_be_visible(timeout=30 * SECONDS)
    return page


def compare_button(page: Page) -> Any:
    return page.get_by_test_id("stMain").get_by_role("button", name=re.compile("^Compare|Compare "))


def tokens_of(page: Page) -> list[int]:
    """How many tokens each streaming pane has."""
    lines = page.get_by_text(re.compile(r"^[\d,]+ tokens · .* held$")).all_inner_texts()
    return [int(line.split()[0].replace(",", "")) for line in lines]


def wait_until(page: Page, condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, page.get_by_test_id("stMain").inner_text()[-1500:]
        page.wait_for_timeout(50)


def shot(page: Page, name: str, *, whole: bool = True) -> None:
    """A screenshot of the whole page, whose height the window takes for it."""
    ARTIFACTS.mkdir(exist_ok=True)
    size = page.viewport_size
    assert size is not None
    if whole:
        height = page.get_by_test_id("stMain").evaluate("e => e.scrollHeight")
        page.set_viewport_size({"width": size["width"], "height": min(int(height) + 40, 7000)})
        page.wait_for_timeout(1500)
    page.screenshot(path=ARTIFACTS / f"{name}.png")
    page.set_viewport_size(size)


def no_sideways_scroll(page: Page) -> bool:
    wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    main = page.get_by_test_id("stMain").evaluate("e => [e.scrollWidth, e.clientWidth]")
    return bool(wide[0] <= wide[1] and main[0] <= main[1])


def test_first_visit_by_a_deep_link_shows_sidebar_and_recorded_run(address: str, browser: Browser) -> None:
    """Runs first: the server is fresh and its first request is a link with settings."""
    begun = time.monotonic()
    page = visit(browser, f"{address}/compare?bits=3&tokens=48")
    expect(page.get_by_test_id("stSidebar").get_by_text("Max new tokens")).to_be_visible()
    expect(page.get_by_test_id("stMain").get_by_text(re.compile("Recorded$")).first).to_be_visible()
    expect(page.get_by_text("press Compare to measure your own")).to_be_visible()
    painted = time.monotonic() - begun
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("spinbutton", name="Max new tokens")).to_have_value("48")
    expect(page.get_by_text("turboquant:bits=3").first).to_be_visible()
    expect(page.get_by_test_id("stSidebar").get_by_text(re.compile("^.*Ready"))).to_be_visible(timeout=90 * SECONDS)
    print(f"first paint with the recorded run after {painted:.1f} s")
    shot(page, "first-visit")
    page.close()


def test_example_to_verdict_charts_and_export(address: str, browser: Browser, tmp_path: Path) -> None:
    page = visit(browser, f"{address}/?bits=2&tokens=40&residual=16", accept_downloads=True)
    page.get_by_text("Needle", exact=True).click()
    expect(page.get_by_label("Prompt")).to_have_value(re.compile("special magic number"))
    compare_button(page).click()
    begun = time.monotonic()
    wait_until(page, lambda: len(tokens_of(page)) == 2)
    print(f"both panes have tokens {time.monotonic() - begun:.1f} s after Compare")
    first = tokens_of(page)
    wait_until(page, lambda: len(now := tokens_of(page)) == 2 and all(b > a for a, b in zip(first, now, strict=True)))
    shot(page, "streaming", whole=False)
    expect(page.get_by_text("Measured on this machine")).to_be_visible(timeout=150 * SECONDS)
    expect(page.get_by_role("heading", name=re.compile("^(Identical|Different)"))).to_be_visible()
    for label in ("KV cache held", "Heads at risk", "Top-1 match", "Cosine of scores", "Mean KL"):
        expect(page.get_by_test_id("stMetric").filter(has_text=label)).to_be_visible()
    expect(page.get_by_test_id("stPlotlyChart")).to_have_count(6)
    expect(page.get_by_text(re.compile("CompressedCache · turboquant:bits=2,residual_length=16"))).to_be_visible()
    shot(page, "finished-light")
    page.get_by_text("Show as a table").first.click()
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()
    page.get_by_role("button", name="Export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Run as JSON").click()
    path = tmp_path / "run.json"
    download.value.save_as(path)
    run = json.loads(path.read_text())
    assert run["origin"] == "measured"
    assert run["comparison"]["compressed"]["report"]["compressed_tokens"] > 300
    page.keyboard.press("Escape")
    shared_link_reopens(page, browser)
    import_shows_the_run(page, path)
    page.close()


def shared_link_reopens(page: Page, browser: Browser) -> None:
    assert "example=needle" in page.url
    other = visit(browser, page.url)
    expect(other.get_by_label("Prompt")).to_have_value(re.compile("special magic number"))
    expect(other.get_by_role("spinbutton", name="Max new tokens")).to_have_value("40")
    expect(other.get_by_text("turboquant:bits=2,residual_length=16").first).to_be_visible()
    other.close()


def import_shows_the_run(page: Page, path: Path) -> None:
    page.get_by_text("Open an exported run").click()
    page.locator("input[type=file]").set_input_files(path)
    expect(page.get_by_text(re.compile("Imported$")).first).to_be_visible()


def test_stop_keeps_the_partial_text(address: str, browser: Browser) -> None:
    page = visit(browser, f"{address}/?tokens=400")
    page.get_by_label("Prompt").fill("Tell a long story about a lighthouse keeper.")
    page.get_by_label("Prompt").press("Control+Enter")
    wait_until(page, lambda: len(now := tokens_of(page)) == 2 and min(now) >= 4)
    begun = time.monotonic()
    page.get_by_role("button", name=re.compile("Stop.*Esc")).click()
    expect(page.get_by_role("heading", name=re.compile("^Stopped after"))).to_be_visible(timeout=15 * SECONDS)
    seconds = time.monotonic() - begun
    print(f"Stop took {seconds:.2f} s to the redrawn page")
    assert seconds < 3
    expect(page.get_by_test_id("stText").first).not_to_be_empty()
    expect(compare_button(page)).to_be_enabled()
    shot(page, "stopped")
    page.close()


def test_a_closed_tab_frees_the_engine(address: str, browser: Browser) -> None:
    gone = visit(browser, f"{address}/?tokens=500&temperature=1.0")
    gone.get_by_label("Prompt").fill("Tell a very long story about the sea, with many chapters.")
    compare_button(gone).click()
    wait_until(gone, lambda: len(now := tokens_of(gone)) == 2 and min(now) >= 2)
    here = visit(browser, f"{address}/?tokens=4")
    here.get_by_label("Prompt").fill("Hello")
    compare_button(here).click()
    expect(here.get_by_text("1 run is ahead of you")).to_be_visible()
    gone.close()
    expect(here.get_by_text("Measured on this machine")).to_be_visible(timeout=15 * SECONDS)
    here.close()


def test_nothing_packed_is_said_and_can_be_fixed(address: str, browser: Browser) -> None:
    page = visit(browser, f"{address}/?tokens=4")
    page.get_by_label("Prompt").fill("What is the capital of France?")
    compare_button(page).click()
    expect(page.get_by_role("heading", name=re.compile("^Nothing was packed"))).to_be_visible(timeout=60 * SECONDS)
    expect(page.get_by_test_id("stMetric")).to_have_count(0)
    shot(page, "nothing-packed")
    page.get_by_role("button", name="Use the long example").click()
    expect(page.get_by_label("Prompt")).to_have_value(re.compile("harbour of Arnsey"))
    page.close()


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("phone", 390, "light"), ("phone-dark", 390, "dark"), ("dark", 1440, "dark")]
)
def test_the_page_fits_and_follows_the_colour_scheme(
    address: str, browser: Browser, name: str, width: int, scheme: Any
) -> None:
    page = visit(browser, address, width, color_scheme=scheme)
    expect(page.get_by_test_id("stPlotlyChart")).to_have_count(6)
    background = page.get_by_test_id("stApp").evaluate("e => getComputedStyle(e).backgroundColor")
    assert background == ("rgb(18, 21, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert no_sideways_scroll(page)
    shot(page, name)
    page.close()
