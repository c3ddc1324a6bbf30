"""`turboquant report`: tables and plots from any set of records, and the README's tables."""

import json
from pathlib import Path
from typing import Annotated

import typer

from turboquant.cli.app import app, check_writable, fail


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
        Path | None, typer.Option(help="Fill this file's tables (default: README.md, if nothing else is written).")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if the tables are stale.")] = False,
) -> None:
    """Aggregate records: the README's tables between their markers, or a report as Markdown and as HTML.

    Without --results the folder results/ is read. Of several records of one cell the newest counts.
    """
    places = results or [Path("results")]
    if missing := [place for place in places if not place.exists()]:
        fail(f"{missing[0]} does not exist", 2)
    if check and (markdown or html):
        fail("--check changes nothing: it goes with --readme, not with --markdown or --html", 2)
    for output in filter(None, (markdown, html)):
        check_writable(output)
    summary: dict[str, object] = {"results": list(map(str, places))}
    if markdown or html:
        summary |= _write(places, markdown, html)
    if readme or not (markdown or html):
        summary |= _fill(readme or Path("README.md"), places, check)
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


def _fill(readme: Path, places: list[Path], check: bool) -> dict[str, object]:
    """Fill a README's tables, or check them; return which were stale."""
    from turboquant.report import ReportError, fill_readme

    try:
        before = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{readme} cannot be read: {error}", 2)
    try:
        after, stale = fill_readme(before, *places)
    except ReportError as error:
        fail(error, 1)
    if check and stale:
        fail(f"stale in {readme}: the tables {', '.join(stale)}; run `turboquant report`", 1)
    if not check and after != before:
        readme.write_text(after, encoding="utf-8")
    return {"readme": str(readme), "stale": stale}
