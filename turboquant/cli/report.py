"""`turboquant report`: tables and plots from any set of records, and the tables of README and docs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from turboquant.cli.app import app, check_apart, check_writable, fail


@app.command()
def report(
    results: Annotated[
        list[Path] | None, typer.Option(help="Files of records and folders of such; one or several.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write tables and plots to this one file, which stands alone.")
    ] = None,
    readme: Annotated[
        list[Path] | None,
        typer.Option(
            help="Fill the tables of these files (default, if nothing else is written: README.md and those of "
            "docs/*.md that have any)."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if the tables are stale.")] = False,
) -> None:
    """Aggregate records: tables of README and docs between their markers, or a report as Markdown and as HTML.

    Without --results the folder results/ is read. Of several records of one cell the newest counts, a CPU's and a
    GPU's apart.
    """
    places = results or [Path("results")]
    if missing := [place for place in places if not place.exists()]:
        fail(f"{missing[0]} does not exist", 2)
    if check and (markdown or html):
        fail("--check changes nothing: it goes with --readme, not with --markdown or --html", 2)
    for output in filter(None, (markdown, html)):
        check_writable(output, read_back=False)
    check_apart(markdown=markdown, html=html)
    summary: dict[str, object] = {"results": list(map(str, places))}
    if markdown or html:
        summary |= _write(places, markdown, html)
    if readme or not (markdown or html):
        summary |= _fill(readme or _own_files(), places, check)
    typer.echo(json.dumps(summary))


def _write(places: list[Path], markdown: Path | None, html: Path | None) -> dict[str, object]:
    """Write the report; return what it holds."""
    from turboquant.report import ReportError, build_report, read_results, to_html, to_markdown

    try:
        sections = build_report(read_results(places), plots=html is not None)
        if markdown:
            markdown.write_text(to_markdown(sections), encoding="utf-8")
        if html:
            html.write_text(to_html(sections), encoding="utf-8")
    except ReportError as error:
        fail(error, 1)
    except ImportError as error:
        fail(f"--html needs the package {error.name}: pip install 'turboquant-lab[plots]'", 2)
    return {
        "written": [str(output) for output in (markdown, html) if output],
        "tables": sum(len(section.tables) for section in sections),
        "plots": sum(len(panel.plots) for section in sections for panel in section.panels),
    }


def _own_files() -> list[Path]:
    """README.md, and those files of docs/ that have a place for tables."""
    docs = sorted(Path("docs").glob("*.md"))
    return [Path("README.md"), *(path for path in docs if "<!-- results: " in _read(path))]


def _read(path: Path) -> str:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            fail(f"{path} must be a file, and this is a pipe or a device", 2)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", 2)


def _fill(files: list[Path], places: list[Path], check: bool) -> dict[str, object]:
    """Fill the tables of files, or check them; return which were stale. Nothing is written where one has an error."""
    from turboquant.report import ReportError, fill_readme

    before = {path: _read(path) for path in files}
    after: dict[Path, str] = {}
    stale: dict[str, list[str]] = {}
    for path, text in before.items():
        try:
            after[path], names = fill_readme(text, *places)
        except ReportError as error:
            fail(f"{path}: {error}", 1)
        if names:
            stale[str(path)] = names
    if check and stale:
        found = "; ".join(f"stale in {path}: the tables {', '.join(names)}" for path, names in stale.items())
        fail(f"{found}; run `turboquant report`", 1)
    for path, text in after.items():
        if not check and text != before[path]:
            path.write_text(text, encoding="utf-8")
    return {"readme": list(map(str, files)), "stale": stale}
