"""The shape of the repository, read from its source: who may import whom, what starts light, how long a file may be."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import turboquant

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "turboquant").rglob("*.py"))
APP = [*sorted((ROOT / "app").rglob("*.py")), *sorted((ROOT / "pages").rglob("*.py")), ROOT / "streamlit_app.py"]
# Those that read texts; the others run experiments, on this machine or on several.
READERS = ("heads", "needle", "perplexity", "seeds", "speed")
EXPERIMENTS = [ROOT / "turboquant" / "experiments" / f"{name}.py" for name in READERS]
SOURCES = [*LIBRARY, *APP, *sorted((ROOT / "tests").rglob("*.py"))]


def rows_of(readme: Path) -> dict[str, int]:
    """The rows of a README's floor plan by name, from the top down: a folder imports only from rows below its own."""
    rows = [line.split("|")[1] for line in readme.read_text().splitlines() if line.startswith("| `")]
    return {name: row for row, names in enumerate(rows) for name in re.findall(r"`(\w+)`", names)}


ROW = {"__main__": -1, **rows_of(ROOT / "turboquant" / "README.md")}
APP_ROW = rows_of(ROOT / "app" / "README.md")
USES_TRANSFORMERS = {"cache", "experiments", "hf_attention", "integrations", "models", "run", "sizing"}
MAX_LINES = 600


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """The module directly below `turboquant` that a file belongs to."""
    return path.relative_to(ROOT / "turboquant").parts[0].removesuffix(".py")


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, but for what only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from executed(child)


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything a tree imports, but for types; `from a import b` gives `a` and `a.b`."""
    for node in executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def library_parts(names: set[str]) -> set[str]:
    """Which modules directly below `turboquant` are meant; `from turboquant import x` is looked up."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "turboquant" and len(parts) > 1:
            home = parts[1] if parts[1] in ROW else turboquant._MODULE_OF.get(parts[1], parts[1])
            found.add(home.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_is_imported_of_our_own_exists(path: Path) -> None:
    """Type checkers pass over modules that are missing, and some imports run only on a GPU or at night."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            if name.split(".")[0] in ("turboquant", "app", "tests"):
                place = ROOT.joinpath(*name.split("."))
                assert place.is_dir() or place.with_suffix(".py").is_file(), f"{name} does not exist"


def test_modules_whose_shapes_are_checked_exist() -> None:
    (option,) = re.findall(r"--jaxtyping-packages=([^\"]+)", (ROOT / "pyproject.toml").read_text())
    *modules, checker = option.split(",")
    assert checker == "beartype.beartype"
    for name in modules:
        assert ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file(), f"{name} does not exist"


def test_every_folder_is_a_floor() -> None:
    folders = {part_of(path) for path in LIBRARY} - {"__init__"}
    assert folders == set(ROW), "the table in turboquant/README.md is the plan"


def test_unit_tests_follow_the_floors() -> None:
    """`tests/unit/<package>/test_<module>.py`; what is about no single module is named for its subject."""
    unit = ROOT / "tests" / "unit"
    assert {path.relative_to(unit).parts[0] for path in unit.rglob("*.py")} <= set(ROW) - {"__main__"}


def test_nothing_lies_flat() -> None:
    assert {path.name for path in (ROOT / "turboquant").glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", [path for path in LIBRARY if part_of(path) != "__init__"], ids=name_of)
def test_imports_run_downwards(path: Path) -> None:
    own = part_of(path)
    for other in library_parts(imported(path)) - {own, "__init__", "__version__"}:
        assert ROW[other] > ROW[own], f"{own} imports {other}"


@pytest.mark.parametrize("files", [LIBRARY, APP], ids=["library", "app"])
def test_modules_use_each_other_one_way(files: list[Path]) -> None:
    """On every floor, imports within functions too."""
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    modules = {".".join(names).removesuffix(".__init__"): path for path, names in parts.items()}
    graph = {name: set(imported(path)) & set(modules) - {name, "turboquant", "app"} for name, path in modules.items()}
    assert tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=name_of)
def test_imports_of_the_app_run_downwards(path: Path) -> None:
    own = path.relative_to(ROOT / "app").parts[0].removesuffix(".py")
    for name in imported(path) if own != "__init__" else ():
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if first == "app" and other not in ("", own):
            pages = APP_ROW[other] == APP_ROW[own] == APP_ROW["compare"]
            assert APP_ROW[other] > APP_ROW[own] or pages, f"{own} imports {other}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_stands_alone(path: Path) -> None:
    assert not roots(path) & {"app", "pages", "tests", "streamlit", "streamlit_app", "pandas"}
    assert name_of(path) == "turboquant/report/plots.py" or "plotly" not in roots(path)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_transformers_is_used_where_models_and_caches_are(path: Path) -> None:
    allowed = part_of(path) in USES_TRANSFORMERS or name_of(path) == "turboquant/methods/hf_quantized.py"
    assert allowed or "transformers" not in roots(path)


@pytest.mark.parametrize("path", [*LIBRARY, *APP], ids=name_of)
def test_compilers_are_used_in_kernels_only(path: Path) -> None:
    assert "kernels" in path.parts or not roots(path) & {"numba", "triton"}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_compiled_kernels_are_imported_behind_their_door_and_only_when_called(path: Path) -> None:
    compiled = ("turboquant.kernels.triton", "turboquant.kernels.cpu")
    tree = ast.parse(path.read_text())
    if path.parent.name == "kernels":
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    if not {"triton", "cpu"} & set(path.parent.parts):
        assert not [name for name in imports(tree) if name.startswith(compiled)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiments_read_texts_in_the_one_way_that_is_noted(path: Path) -> None:
    """What `turboquant.texts.read_text` reads is noted in records, so that they show when it has changed."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = {call.id for call in calls if isinstance(call, ast.Name)}
    methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    assert not (named | methods) & {"open", "Path", "read_bytes"}
    assert "read_text" not in methods


@pytest.mark.parametrize("path", APP, ids=name_of)
def test_pages_use_the_app_and_the_app_uses_no_page(path: Path) -> None:
    assert "tests" not in roots(path)
    assert "pages" not in roots(path)
    if path.parent.name == "pages":
        assert "turboquant" not in roots(path)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("turboquant", ("torch", "transformers", "streamlit", "numba")),
        ("turboquant.cli", ("torch", "transformers", "streamlit", "numba")),
        ("turboquant.methods", ("transformers", "streamlit", "numba", "triton")),
        ("turboquant.records.files", ("transformers", "streamlit", "numba")),
    ],
)
def test_what_an_import_does_not_bring_along(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == ""


def test_public_names_exist_and_say_what_they_do() -> None:
    assert sorted(turboquant.__all__) == sorted(turboquant._MODULE_OF)
    for name in turboquant.__all__:
        thing = getattr(turboquant, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name
            assert not thing.__doc__.startswith(f"{name}("), f"{name} has only the docstring of its decorator"
        else:
            assert name.isupper()


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        turboquant.compres  # noqa: B018


@pytest.mark.parametrize("path", [*LIBRARY, *APP], ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)) or not text.strip()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_nothing_names_a_place_outside_the_repository() -> None:
    """Package indexes and folders of one machine belong to that machine's own settings."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    forbidden = [middle.join(ends) for middle, ends in ((".", ("pypi", "org")), ("on", ("files.pyth", "hosted")))]
    forbidden += ["/" + folder + "/" for folder in ("work", "home")]
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file():
            text = path.read_bytes().decode(errors="ignore").replace("/home/user", "")  # the image's user
            found += [f"{name}: {word}" for word in forbidden if word in text]
    assert not found
