"""The app as people meet it: a real server, a real browser, the real built-in model."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import IN_A_BROWSER, SECONDS, main, no_sideways_scroll, shot, visit, wait_until

pytestmark = IN_A_BROWSER


def compare_button(page: Page) -> Any:
    return page.get_by_test_id("stMain").get_by_role("button", name=re.compile("^Compare|Compare "))


def tokens_of(page: Page) -> list[int]:
    """How many tokens each streaming pane has."""
    lines = page.get_by_text(re.compile(r"^[\d,]+ tokens · .* held$")).all_inner_texts()
    return [int(line.split()[0].replace(",", "")) for line in lines]


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
    page = visit(browser, f"{address}/?bits=2&tokens=40&residual=16")
    main(page).get_by_text("Needle", exact=True).click()
    expect(page.get_by_label("Prompt")).to_have_value(re.compile("special magic number"))
    compare_button(page).click()
    begun = time.monotonic()
    wait_until(page, lambda: len(tokens_of(page)) == 2)
    print(f"both panes have tokens {time.monotonic() - begun:.1f} s after Compare")
    first = tokens_of(page)
    wait_until(page, lambda: len(now := tokens_of(page)) == 2 and all(b > a for a, b in zip(first, now, strict=True)))
    shot(page, "streaming", whole=False)
    expect(page.get_by_text("Measured here").first).to_be_visible(timeout=150 * SECONDS)
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


@pytest.mark.nightly
def test_a_closed_tab_frees_the_engine(address: str, browser: Browser) -> None:
    gone = visit(browser, f"{address}/?tokens=500&temperature=1.0")
    gone.get_by_label("Prompt").fill("Tell a very long story about the sea, with many chapters.")
    compare_button(gone).click()
    wait_until(gone, lambda: len(now := tokens_of(gone)) == 2 and min(now) >= 2)
    here = visit(browser, f"{address}/?tokens=4")
    here.get_by_label("Prompt").fill("Hello")
    compare_button(here).click()
    expect(main(here).get_by_text("1 run is ahead of you").first).to_be_visible()
    gone.close()
    expect(here.get_by_text("Measured here").first).to_be_visible(timeout=15 * SECONDS)
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


def test_on_a_dark_phone_the_page_fits_from_the_start(address: str, browser: Browser) -> None:
    page = visit(browser, address, 390, color_scheme="dark")
    expect(page.get_by_test_id("stPlotlyChart")).to_have_count(6)
    assert page.get_by_test_id("stApp").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(18, 21, 28)"
    assert no_sideways_scroll(page)
    shot(page, "phone-dark")
    page.close()
