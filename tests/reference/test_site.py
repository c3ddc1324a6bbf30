"""The documentation as a site: it builds without a warning, is whole, and fetches nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import turboquant
from tests.support.pages import PAGES, ROOT

BY_ITSELF = {"img": "src", "script": "src", "iframe": "src", "source": "src"}
"""Elements with the attribute that a browser fetches unasked."""


class Fetched(HTMLParser):
    """Collects what a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        wanted = named.get("href") if tag == "link" else named.get(BY_ITSELF.get(tag, ""))
        if wanted and named.get("rel") not in ("next", "prev"):
            self.found.append(wanted)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in PAGES:
        path = page.relative_to(ROOT)
        name = "index" if path.name == "README.md" else path.stem
        assert (site / path.with_name(f"{name}.html")).is_file(), path


def test_every_public_name_is_described(site: Path) -> None:
    page = (site / "docs" / "api.html").read_text(encoding="utf-8")
    described = re.findall(r'<h2 id="turboquant\.(\w+)"', page)
    assert described == turboquant.__all__
    assert "Return a small causal language model with random weights" in page  # a docstring


def test_formulas_are_formulas(site: Path) -> None:
    sources = (ROOT / "docs" / "methodology.md").read_text(encoding="utf-8").count("```math")
    page = (site / "docs" / "methodology.html").read_text(encoding="utf-8")
    assert page.count("<math ") == sources > 0


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found
        for address in parser.found:
            assert not re.match(r"\w+:|//", address), f"{page.name} fetches {address}"
            # Only the page for addresses that do not exist, which a server shows anywhere, names files from the root.
            base = site if page.name == "404.html" else page.parent
            assert (base / address.lstrip("/").partition("?")[0]).is_file(), f"{page.name}: {address}"
