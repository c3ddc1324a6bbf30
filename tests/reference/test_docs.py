"""README and docs/*.md: their code runs, their commands and methods exist, their links lead somewhere."""

import functools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import turboquant
from tests.support.pages import LANGUAGES, PAGES, ROOT, Block, anchors, blocks, command_of, links, name_of, prose
from turboquant import cli
from turboquant.methods import METHODS, parse_method
from turboquant.models.load import load_model

BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "sh"]
RUN = [block for block in PYTHON if block.mark != "not run"]
load_once = functools.cache(load_model)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in; a model is loaded once for all pages."""

    def load(name: str, *, progress: object = None, **options: str) -> Any:
        return load_once(name, **options)

    monkeypatch.setattr(turboquant, "load_model", load)  # before the module it comes from, so that it comes back
    monkeypatch.setattr("turboquant.models.load.load_model", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_a_block_says_what_becomes_of_it(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.where}: language {block.language!r}"
    if block.language == "sh":
        assert block.mark in ("run", "not run"), f"{block.where}: mark it <!-- run --> or <!-- not run: reason -->"
    if block.mark == "not run":
        assert len(block.said) > 10, f"{block.where}: say why it is not run"
    if block.language == "python":
        compile(textwrap.dedent(block.text), block.where, "exec")


@pytest.mark.parametrize("page", list(dict.fromkeys(block.page for block in RUN)), ids=name_of)
def test_the_python_of_a_page_runs(page: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(METHODS)
    variables: dict[str, Any] = {"__name__": "page"}
    try:
        for block in RUN:
            if block.page == page:
                exec(compile(block.code, page, "exec"), variables)
    finally:
        for name in set(METHODS) - before:
            del METHODS[name]
    CHECKS.get(name_of(page), lambda *_: None)(variables, capsys.readouterr().out)


def check_readme(variables: dict[str, Any], printed: str) -> None:
    assert "cache_class='CompressedCache'" in printed
    report = turboquant.cache_report(variables["cache"])
    assert report.compressed_tokens > 100
    assert report.compression_ratio > 1.5


def check_pipeline(variables: dict[str, Any], printed: str) -> None:
    packed = re.findall(r"^(\d+) tokens packed$", printed, flags=re.MULTILINE)
    assert len(packed) == 2
    assert all(int(count) >= 32 for count in packed)
    assert variables["answer"][0]["generated_text"][-1]["role"] == "assistant"


def check_library(variables: dict[str, Any], printed: str) -> None:
    assert "'one-bit'" not in printed  # before its file has run
    assert variables["cache"].method.name == "one-bit"
    assert "1.25 bits a packed value" in printed
    kl = [float(value) for value in re.findall(r"^turboquant:bits=\d KL ([\d.]+)", printed, flags=re.MULTILINE)]
    assert 0 < kl[0] < kl[1]
    assert variables["found"].tokens.mean_kl > 0
    assert float(variables["lost"]) == pytest.approx(turboquant.expected_mse(4, 128), rel=0.05)
    assert "3 layers compressed" in printed
    assert printed.count("bits must be a whole number from 1 to 8") == 1


CHECKS = {"README.md": check_readme, "docs/pipeline.md": check_pipeline, "docs/library.md": check_library}


def test_the_method_of_the_library_page_is_one_file(tmp_path: Path) -> None:
    """Put where the page says, it is found without another line."""
    (block,) = [block for block in PYTHON if block.mark == "file"]
    shutil.copytree(ROOT / "turboquant", tmp_path / "turboquant", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / block.said).write_text(block.text)
    command = [sys.executable, "-m", "turboquant", "methods", "--list"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\none-bit\n    Signs." in done.stdout


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in SHELL if block.mark == "run"], ids=lambda block: block.where)
def test_commands_marked_so_run(block: Block, machine: Path) -> None:
    for words in block.commands():
        arguments = command_of(words)
        assert arguments is not None, f"{block.where}: only turboquant's commands can be run here, got {words[0]}"
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, f"{block.where}: {' '.join(words)}\n{result.output}"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_commands_have_the_options_that_are_named(block: Block) -> None:
    """Each is parsed as far as its options, and not called."""
    makefile = (ROOT / "Makefile").read_text()
    for words in block.commands():
        if words[0] == "make":
            for target in words[1:]:
                assert "=" in target or f"\n{target}:" in makefile, f"{block.where}: make {target}"
        if (arguments := command_of(words)) is not None:
            parse(arguments, block.where)


def parse(arguments: list[str], where: str) -> None:
    """Raise unless `turboquant` takes these arguments."""
    command: Any = get_command(cli.app)
    context = None
    while hasattr(command, "commands"):
        assert arguments, f"{where}: a command is missing behind {command.name}"
        assert arguments[0] in command.commands, f"{where}: there is no command {arguments[0]!r}"
        context = command.context_class(command, parent=context, info_name=command.name)
        command, arguments = command.commands[arguments[0]], arguments[1:]
    try:
        command.make_context(command.name, list(arguments), parent=context)
    except Exception as error:
        raise AssertionError(f"{where}: {command.name} {' '.join(arguments)}: {error}") from error


def test_wrong_options_would_be_found() -> None:
    parse(["needle", "--bits", "2", "4"], "here")
    for wrong in (["needle", "--bit", "2"], ["bench", "decod"], ["sweep", "--workers", "none"]):
        with pytest.raises(AssertionError, match=r"here: "):
            parse(wrong, "here")


# -- what is named -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        name = str(target.relative_to(ROOT))
        assert target.exists(), f"{name_of(page)} links {link}: there is no {name}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links {link}: {name} has {sorted(anchors(target))}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [PAGES[0]]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        waiting += [one for one in PAGES if one in targets and one not in reached]
    assert set(PAGES) == reached


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_methods_that_are_named_exist(page: Path) -> None:
    names = "|".join(map(re.escape, sorted(METHODS, key=len, reverse=True)))
    for spec in re.findall(rf"(?<![\w/-])((?:{names}):\w+=[\w=,+/:-]*[\w])", page.read_text(encoding="utf-8")):
        if spec not in WRONG:
            parse_method(spec)


WRONG = {"turboquant:bits=9", "turboquant:bit=4"}
"""Examples of what is refused."""


def test_the_library_page_lists_every_method_and_option() -> None:
    page = prose(ROOT / "docs" / "library.md")
    for name, method in METHODS.items():
        (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", page, flags=re.MULTILINE)
        named = re.findall(r"`([\w-]+)`(?: of keys)?(?: \(([\w-]+))?", row.split(" | ")[2])
        wanted = {field.name: field.default for field in fields(method)}
        options = dict(named[1:] if named and named[0][0] in METHODS else named)  # "those of `turboquant`" first
        assert set(options) == set(wanted), name
        for option, default in options.items():
            if option == "bits":
                assert default == str(vars(method())["bits"]), name
            elif option not in ("key_bits", "value_bits"):
                assert default == (str(wanted[option]).lower() or "none"), f"{name}: {option}"


def test_the_library_page_names_everything_public() -> None:
    page = prose(ROOT / "docs" / "library.md")
    assert not [name for name in turboquant.__all__ if f"`{name}" not in page and f"{name}`" not in page]


def test_the_guide_has_every_page_and_says_of_each_figure_what_the_app_says() -> None:
    from app.about.facts import defined
    from app.navigation import ENTRIES

    page = ROOT / "docs" / "guide.md"
    wanted = {f"| {row.figure} | {row.meaning} |" for row in defined().itertuples()}
    tables = page.read_text(encoding="utf-8").split("| figure | what it means |\n|---|---|\n")[1:]
    found = {line for table in tables for line in table.partition("\n\n")[0].splitlines()}
    assert not wanted - found, "docs/guide.md lacks these rows:\n" + "\n".join(wanted - found)
    assert not found - wanted, "docs/guide.md has rows that the app has not:\n" + "\n".join(found - wanted)
    assert {entry.name for entry in ENTRIES} <= anchors(page)


def test_the_guide_quotes_recorded_figures() -> None:
    from turboquant.records.comparison import Comparison
    from turboquant.records.files import read_records

    guide = " ".join((ROOT / "docs" / "guide.md").read_text(encoding="utf-8").split())
    found = {record.cell.method: record.metrics for record in read_records(ROOT / "results" / "methods.jsonl")}

    def quoted(method: str, name: str, form: str) -> list[str]:
        return [f"{found[f'{method}:bits={bits}'][name]:{form}}" for bits in (4, 3, 2)]

    for method, name, form, unit in (
        ("turboquant", "kl_mean", ".4f", "nats"),
        ("turboquant", "same_top_pct", ".1f", "%"),
        ("turboquant-paper", "kl_mean", ".2f", ""),
    ):
        first, second, third = quoted(method, name, form)
        assert f"{first}, {second} and {third} {unit}".strip() in guide
    held, packed = (found["turboquant:bits=4"][name] for name in ("bits_per_value", "packed_bits_per_value"))
    assert f"at 2,048 tokens it is {held:.1f} bits, and each further token costs {packed:.1f}" in guide
    recorded = json.loads((ROOT / "assets" / "runs" / "01-summary-4-bits.json").read_text())
    run = Comparison.model_validate(recorded["comparison"])
    report = run.compressed.report
    assert f"holds {report.bits_per_value:.1f} bits a value, {report.compression_ratio:.2f} times less" in guide
    assert run.heads is not None
    assert run.tokens is not None
    risk = run.heads.packed.heads_at_risk_pct, run.heads.served.heads_at_risk_pct
    assert f"{risk[0]:.0f} % of heads are at risk over packed tokens, {risk[1]:.0f} % as served" in guide
    assert f"the mean KL is {run.tokens.mean_kl:.3f}" in guide


def test_the_recorded_recommendations_follow_from_their_records() -> None:
    """The searches are gone through again on the records alone; nothing is measured."""
    from turboquant.experiments.recommend import recommend
    from turboquant.experiments.recommendation import RecommendSettings
    from turboquant.records.files import read_records

    page = (ROOT / "docs" / "recommend.md").read_text(encoding="utf-8")
    records = read_records(ROOT / "results" / "recommend.jsonl")
    (commit,) = {record.environment.commit for record in records}
    assert f"commit {commit}" in page
    for max_kl in (0.002, 0.01, 0.05):
        new: list[Any] = []
        settings = RecommendSettings(max_kl=max_kl)
        found = recommend(load_once("smollm2-135m", weights="fp32"), settings, known=records, keep=new.append)
        assert not new
        assert recorded_row(found) in page, recorded_row(found)


def recorded_row(found: Any) -> str:
    """One line of the page's table."""
    held_out, first, last = found.evidence("confirm"), found.memory[0], found.memory[-1]
    return (
        f"| {found.settings.max_kl:g} | `{found.method}` | {held_out.kl:.4f} ({held_out.kl_low:.4f} to "
        f"{held_out.kl_high:.4f}) | {held_out.same_top_pct:.1f} | {found.measured} of {found.candidates} | "
        f"{len(found.tried) + len(found.layer_kl)} | {first.bytes / 1e6:.1f}, {first.times_smaller:.2f} | "
        f"{last.bytes / 1e6:.1f}, {last.times_smaller:.2f} |"
    )
