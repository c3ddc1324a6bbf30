"""Rules of the app's code: who may import whom, no figure typed into a page, files of a readable size."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APP = sorted((ROOT / "app").rglob("*.py"))
PAGES = sorted((ROOT / "pages").glob("*.py"))
MAY_USE_STREAMLIT = {"main.py", "state.py"}


def imports(path: Path) -> set[str]:
    """Every module a file names in an import."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", APP, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_views_shared_pieces_and_the_bridge_import_streamlit(path: Path) -> None:
    allowed = path.parent.name == "ui" or path.stem.endswith("view") or path.name in MAY_USE_STREAMLIT
    assert allowed or not any(name.split(".")[0] == "streamlit" for name in imports(path))


@pytest.mark.parametrize("path", APP, ids=lambda p: str(p.relative_to(ROOT)))
def test_app_never_imports_pages(path: Path) -> None:
    assert not any(name.split(".")[0] == "pages" for name in imports(path))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_pages_hold_widgets_only(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"torch", "transformers", "plotly"}
    assert len(path.read_text().splitlines()) <= 150


def test_the_library_never_imports_the_app() -> None:
    for path in (ROOT / "turboquant").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"streamlit", "app", "pages"}, path


@pytest.mark.parametrize("path", [*APP, *PAGES, ROOT / "streamlit_app.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_percentage_is_typed_in(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.replace("95 % interval", "")  # a level of confidence is no result
            assert not re.search(r"\d\s*(%|percent|per cent)", text), node.value


@pytest.mark.parametrize("path", [*APP, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_html_is_let_through(path: Path) -> None:
    text = path.read_text()
    assert "unsafe_allow" not in text
    assert "st.html(" not in text
    assert "<style" not in text
