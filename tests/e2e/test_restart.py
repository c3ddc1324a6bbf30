"""A server that is killed under an open page, in a real browser."""

import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.conftest import ENVIRONMENT, IN_A_BROWSER, SECONDS, main, visit
from tests.support.process import Server

pytestmark = [*IN_A_BROWSER, pytest.mark.nightly]
PROMPT = "When does the tide turn, and when can the boats leave the harbour of Arnsey? " * 6


def test_an_open_page_goes_on_with_the_next_server(tmp_path: Path, browser: Browser) -> None:
    """Killed in the middle of a run: the page connects again by itself, with its settings and prompt, and works."""
    with Server(tmp_path / "log.txt", ENVIRONMENT) as server:
        page = visit(browser, f"{server.address}/compare?tokens=200&bits=3")
        page.get_by_label("Prompt").fill(PROMPT)
        main(page).get_by_role("button", name="Compare").click()
        expect(main(page).get_by_text("Both sides answer")).to_be_visible(timeout=90 * SECONDS)
        expect(page).to_have_url(re.compile("prompt=When"))
        server.send(signal.SIGKILL)
        server.wait(10)
        server.start()
        expect(main(page).get_by_role("button", name="Compare")).to_be_enabled(timeout=60 * SECONDS)
        expect(page.get_by_label("Prompt")).to_have_value(PROMPT)
        expect(page).to_have_url(re.compile(r"(?=.*tokens=200)(?=.*bits=3)"))
        expect(page.get_by_test_id("stException")).to_have_count(0)
        tokens = page.get_by_label("Max new tokens", exact=True)
        tokens.fill("4")
        tokens.press("Enter")
        main(page).get_by_role("button", name="Compare").click()
        expect(main(page).get_by_text("Measured here").first).to_be_visible(timeout=120 * SECONDS)
        expect(page).to_have_url(re.compile(r"(?=.*tokens=4)(?=.*bits=3)(?=.*prompt=When)"))
        page.close()
    assert "Traceback" not in server.log.read_text()
