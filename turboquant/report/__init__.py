"""Reports made from records: the README's tables, Markdown, and a self-contained HTML page."""

from turboquant.report.page import Section, build_report, to_html, to_markdown
from turboquant.report.readme import README_TABLES, fill_readme
from turboquant.report.summary import ReportError, read_results
from turboquant.report.tables import Table

__all__ = [
    "README_TABLES",
    "ReportError",
    "Section",
    "Table",
    "build_report",
    "fill_readme",
    "read_results",
    "to_html",
    "to_markdown",
]
