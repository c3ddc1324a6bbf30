"""Each page's main action, done by clicking in a real browser with the real model."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import IN_A_BROWSER, SECONDS, main, serve, shot, visit, wait_until
from tests.support.models import tiny_loaded

pytestmark = IN_A_BROWSER
LONG = "The tide table says when the boats can leave the harbour of Arnsey. " * 12


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second model: small, with random weights, in a folder."""
    loaded = tiny_loaded("llama", max_position_embeddings=2048)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, tiny_folder: str) -> Iterator[str]:
    """A server that offers two models."""
    models = {"TURBOQUANT_MODELS": f"smollm2-135m,{tiny_folder}", "TURBOQUANT_DEFAULT_MODEL": "smollm2-135m"}
    yield from serve(tmp_path_factory.mktemp("server") / "log.txt", os.environ | models)


def press(page: Page, name: str) -> None:
    main(page).get_by_role("button", name=re.compile(f"^{name}")).first.click()


def charts(page: Page) -> Any:
    return page.get_by_test_id("stPlotlyChart")


def test_compare_two_settings_as_panes_diff_and_focus(address: str, browser: Browser) -> None:
    page = visit(browser, f"{address}/compare?bits=4&second=turboquant%3Abits%3D2&tokens=6")
    main(page).get_by_text("Needle", exact=True).click()
    press(page, "Compare")
    expect(main(page).get_by_text("Measured here").first).to_be_visible(timeout=150 * SECONDS)
    for method in ("turboquant:bits=4", "turboquant:bits=2"):
        expect(main(page).get_by_text(method).first).to_be_visible()
    shot(page, "action-compare-two")
    main(page).get_by_text("diff", exact=True).click()
    expect(page).to_have_url(re.compile("view=diff"))
    shot(page, "action-compare-diff")
    main(page).get_by_text("focus", exact=True).click()
    expect(page).to_have_url(re.compile("view=focus"))
    expect(page.get_by_test_id("stException")).to_have_count(0)
    page.close()


def test_model_text_is_text_and_the_same_again_is_cached(address: str, browser: Browser) -> None:
    """Markup in a prompt is shown as typed, and nothing is fetched or run for it."""
    page = visit(browser, f"{address}/compare?tokens=2")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.get_by_label("Prompt").fill(
        '<script>alert(1)</script> ![x](http://example.invalid/x.png) <img src="http://example.invalid/y.png"> ' + LONG
    )
    press(page, "Compare")
    expect(main(page).get_by_text("Measured here").first).to_be_visible(timeout=90 * SECONDS)
    press(page, "Compare")  # the same once more
    expect(main(page).get_by_text("Cached").first).to_be_visible()
    main(page).get_by_text(re.compile("^Prompt of this run")).click()
    expect(main(page).get_by_text("<script>alert(1)</script>").first).to_be_visible()
    for name in ("runs", "heads"):
        page.get_by_test_id("stSidebar").get_by_role("link", name=name.capitalize()).first.click()
        expect(page.get_by_role("heading", level=1).first).to_be_visible()
        page.wait_for_timeout(800)
    assert not [url for url in asked if "example.invalid" in url]
    page.close()


def test_prompts_one_row_each(address: str, browser: Browser) -> None:
    page = visit(browser, f"{address}/prompts?tokens=6&prompts_source=Typed")
    page.get_by_label("Prompts", exact=True).fill(f"{LONG}\nHello\n")
    page.get_by_label("Prompts", exact=True).press("Control+Enter")
    expect(main(page).get_by_text(re.compile("^2 prompts")).first).to_be_visible()
    press(page, "Run the set")
    expect(page.get_by_test_id("stDataFrame").first).to_be_visible(timeout=90 * SECONDS)
    expect(main(page).get_by_role("button", name=re.compile("^Run the set"))).to_be_enabled(timeout=90 * SECONDS)
    shot(page, "action-prompts")
    page.close()


def test_session_keeps_two_caches_over_two_turns(address: str, browser: Browser) -> None:
    page = visit(browser, f"{address}/session?tokens=6")
    for turn in (1, 2):
        box = page.get_by_placeholder("Your message to both sides")
        box.fill(f"Turn {turn}. {LONG}")
        box.press("Enter")
        expect(page.get_by_text(f"Turn {turn}.").first).to_be_visible()
        expect(box).to_be_enabled(timeout=120 * SECONDS)
    expect(charts(page).first).to_be_visible()
    expect(
        page.get_by_text(re.compile("Both sides hold the same conversation|The answers have parted")).first
    ).to_be_visible()
    expect(page.get_by_test_id("stException")).to_have_count(0)
    shot(page, "action-session")
    page.close()


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("needle", "needle_view=This+tab&needle_lengths=512&needle_depths=0.5&needle_repetitions=1"),
        (
            "methods",
            "methods_view=This+tab&methods_chosen=turboquant%3Abits%3D4&methods_texts=hamlet&methods_context=512",
        ),
        (
            "seeds",
            "seeds_view=This+tab&seeds_rotations=2&seeds_samplings=0&seeds_against=none&seeds_context=256&seeds_texts=hamlet",
        ),
        ("benchmarks", "bench_view=This+tab&bench_contexts=256&bench_tokens=4&bench_repeats=1"),
    ],
)
def test_a_measurement_runs_to_its_charts(address: str, browser: Browser, name: str, query: str) -> None:
    page = visit(browser, f"{address}/{name}?{query}")
    expect(charts(page)).to_have_count(0)
    press(page, "Measure")
    expect(charts(page).first).to_be_visible(timeout=200 * SECONDS)
    expect(main(page).get_by_role("button", name=re.compile("^Stop")).first).to_be_disabled(timeout=200 * SECONDS)
    expect(main(page).get_by_text("Measured here").first).to_be_visible()
    expect(page.get_by_test_id("stException")).to_have_count(0)
    shot(page, f"action-{name}")
    page.close()


def test_a_setting_is_recommended_for_a_text_and_used_in_compare(
    address: str, browser: Browser, tiny_folder: str
) -> None:
    query = f"model={quote(tiny_folder)}&recommend_own=true&recommend_same=50&recommend_kl=0.01"
    page = visit(browser, f"{address}/methods?{query}")
    box = page.get_by_label("Text", exact=True)
    box.fill(
        "\n".join(f"On day {i} the keeper wrote {i * 37 % 101} ships and a tide of {i * i % 89}." for i in range(24))
    )
    box.press("Control+Enter")
    expect(main(page).get_by_role("button", name="Recommend")).to_be_enabled()
    press(page, "Recommend")
    expect(main(page).get_by_text(re.compile("on the held-out part of the text"))).to_be_visible(timeout=120 * SECONDS)
    method = page.get_by_test_id("stCode").last.inner_text().strip()
    assert ":" in method
    shot(page, "action-recommend")
    press(page, "Use it in Compare")
    expect(main(page).get_by_text(f"{method} against the full cache")).to_be_visible()
    expect(page.get_by_test_id("stException")).to_have_count(0)
    page.close()


def test_memory_and_theory_follow_their_widgets(address: str, browser: Browser) -> None:
    page = visit(browser, f"{address}/memory?mem_model=qwen2.5-7b")
    before = page.get_by_test_id("stMetricValue").all_inner_texts()
    main(page).get_by_role("radiogroup", name="Bits of keys").get_by_text("2", exact=True).click()
    wait_until(page, lambda: page.get_by_test_id("stMetricValue").all_inner_texts() != before, 10)
    page.goto(f"{address}/theory?theory_bits=2")
    expect(charts(page).nth(5)).to_be_visible(timeout=60 * SECONDS)
    captions = page.get_by_test_id("stCaptionContainer").all_inner_texts()
    page.goto(f"{address}/theory?theory_bits=4")
    expect(charts(page).nth(5)).to_be_visible(timeout=60 * SECONDS)
    assert page.get_by_test_id("stCaptionContainer").all_inner_texts() != captions
    page.close()


def test_runs_compares_two_and_heads_explains_one(address: str, browser: Browser) -> None:
    page = visit(browser, f"{address}/runs")
    expect(page.get_by_role("heading", name="Two runs side by side")).to_be_visible()
    expect(charts(page).first).to_be_visible()
    page.goto(f"{address}/heads")
    expect(main(page).get_by_text("Why:")).to_be_visible(timeout=30 * SECONDS)
    expect(charts(page).nth(2)).to_be_visible()
    page.close()


@pytest.mark.nightly
def test_two_visitors_with_two_models(address: str, browser: Browser, tiny_folder: str) -> None:
    """They take turns, each gets the own answer, and neither sees the other's run."""
    prompts = {"smollm2-135m": f"First visitor. {LONG}", tiny_folder: f"Second visitor. {LONG}"}
    pages = {model: visit(browser, f"{address}/compare?tokens=4&model={model}") for model in prompts}
    for model, page in pages.items():
        page.get_by_label("Prompt").fill(prompts[model])
        press(page, "Compare")
    for model, page in pages.items():
        expect(main(page).get_by_text("Measured here").first).to_be_visible(timeout=120 * SECONDS)
        expect(main(page).get_by_text(Path(model).name).first).to_be_visible()
        others = [text.split(".")[0] for other, text in prompts.items() if other != model]
        page.get_by_test_id("stSidebar").get_by_role("link", name="Runs").first.click()
        expect(page.get_by_role("heading", level=1, name="Runs of this tab")).to_be_visible()
        assert not any(words in main(page).inner_text() for words in others)
        page.close()


@pytest.mark.nightly
def test_long_work_lets_a_short_run_go_first(address: str, browser: Browser) -> None:
    """A set of prompts is at work; another visitor's Compare is answered before the set ends."""
    busy = visit(browser, f"{address}/prompts?tokens=8&prompts_source=Typed")
    lines = "\n".join(f"Prompt {i}. {LONG}" for i in range(4))
    busy.get_by_label("Prompts", exact=True).fill(lines)
    busy.get_by_label("Prompts", exact=True).press("Control+Enter")
    expect(main(busy).get_by_text(re.compile("^4 prompts")).first).to_be_visible()
    press(busy, "Run the set")
    expect(main(busy).get_by_role("button", name=re.compile("^Stop"))).to_be_enabled()
    short = visit(browser, f"{address}/compare?tokens=3")
    begun = time.monotonic()
    short.get_by_label("Prompt").fill(f"Short. {LONG}")
    press(short, "Compare")
    expect(main(short).get_by_text("Measured here").first).to_be_visible(timeout=90 * SECONDS)
    print(f"a short run beside a set took {time.monotonic() - begun:.1f} s")
    expect(main(busy).get_by_role("button", name=re.compile("^Stop"))).to_be_enabled()
    press(busy, "Stop")
    expect(main(busy).get_by_text(re.compile("^Stopped")).first).to_be_visible(timeout=30 * SECONDS)
    short.close()
    busy.close()
