"""Every page in a real browser: it opens from a link, fits, follows the colour scheme, and is usable by everybody."""

import re
import time
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from app.navigation import ENTRIES
from tests.e2e.conftest import (
    IN_A_BROWSER,
    SECONDS,
    main,
    no_sideways_scroll,
    shot,
    visit,
    wait_until,
    wait_until_still,
)

pytestmark = IN_A_BROWSER
NAMES = [entry.name for entry in ENTRIES]
SERIOUS = ("serious", "critical")
HERE = [
    ("needle", "?needle_view=This+tab&needle_own=true"),
    ("methods", "?methods_view=This+tab"),
    ("seeds", "?seeds_view=This+tab"),
    ("benchmarks", "?bench_view=This+tab"),
]
# What the two decide is apart from each other: widths what fits, schemes the colours.
LOOKS: list[tuple[Literal["light", "dark"], int, str]] = [
    ("light", 1600, "rgb(255, 255, 255)"),
    ("dark", 390, "rgb(18, 21, 28)"),
]


def settled(page: Page) -> None:
    """Wait until the server has drawn the page and the browser every part of it."""
    page.wait_for_timeout(500)
    _drawn(page)


def _drawn(page: Page) -> None:
    for unfinished in ("stStatusWidget", "stSkeleton"):
        expect(page.get_by_test_id(unfinished)).to_have_count(0, timeout=60 * SECONDS)
    wait_until_still(page)


def scrolling_choices(page: Page) -> list[str]:
    """Rows of pills or segments that have to be scrolled sideways."""
    rows = main(page).get_by_test_id("stButtonGroup").locator("[role=toolbar], [role=radiogroup]")
    return [
        str(one)
        for one in rows.evaluate_all("e => e.filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.innerText)")
    ]


def background(page: Page) -> str:
    return str(page.get_by_test_id("stApp").evaluate("e => getComputedStyle(e).backgroundColor"))


def serious_findings(page: Page) -> list[str]:
    """What axe-core calls serious or critical, a line each."""
    violations: list[dict[str, Any]] = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {node['target']} {node['html'][:160]}"
        for one in violations
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]


@pytest.mark.parametrize(("name", "query"), [*((name, "") for name in NAMES), *HERE])
def test_a_page_opens_from_a_link_and_is_usable_by_everybody(
    address: str, browser: Browser, name: str, query: str
) -> None:
    """Wide and light, narrow and dark: no error, nothing cut off, no serious finding of axe-core."""
    begun = time.monotonic()
    page = visit(browser, f"{address}/{name}{query}", 1600)
    print(f"{name}: heading after {time.monotonic() - begun:.1f} s")
    settled(page)
    expect(page.get_by_test_id("stSidebar").get_by_role("link", name="Compare").first).to_be_visible()
    found = []
    for scheme, width, color in LOOKS:
        page.emulate_media(color_scheme=scheme)
        wait_until(page, lambda color=color: background(page) == color)
        page.set_viewport_size({"width": width, "height": 900})
        _drawn(page)
        expect(page.get_by_test_id("stException")).to_have_count(0)
        assert no_sideways_scroll(page), f"{name} is wider than {width} px"
        assert not scrolling_choices(page), f"{name}: choices are cut off at {width} px"
        shot(page, f"{name}{'-here' if query else ''}-{scheme}-{width}")
        found += [f"{scheme}, {width} px: {line}" for line in serious_findings(page)]
    page.close()
    assert not found, "\n".join(found)


def test_pages_are_reached_from_each_other(address: str, browser: Browser) -> None:
    page = visit(browser, address)
    for entry in reversed(ENTRIES):
        page.get_by_test_id("stSidebar").get_by_role("link", name=entry.title, exact=False).first.click()
        settled(page)
        expect(page.get_by_role("heading", level=1).first).to_be_visible()
        expect(page.get_by_test_id("stException")).to_have_count(0)
        expect(page).to_have_title(re.compile(f"^{entry.title}"))
    page.close()
