"""The operator's guide names what the server says about itself."""

import re

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.engine.contract import EngineStatus
from app.engine.job import FINAL
from app.engine.journal import Journal
from tests.support.process import ROOT

GUIDE = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's first table."""
    section = GUIDE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_event_of_the_log_is_in_the_guide() -> None:
    sources = [ROOT / "streamlit_app.py", *(ROOT / "app").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    logged = set(re.findall(r"\bevent\(\s*\"(\w+)\"", text)) | {f"job_{state}" for state in FINAL}
    logged |= set(re.findall(r"event\(\"(\w+)\" if \w+ else \"(\w+)\"", text)[0])
    assert {row[0].strip("`") for row in rows("Log")} == logged


def test_every_metric_is_in_the_guide_with_its_type() -> None:
    journal = Journal()
    journal.watch(lambda: EngineStatus("ready", "a-model", "fp32", "cpu"))
    families = text_string_to_metric_families(generate_latest(journal.registry).decode())
    served = {(f"{family.name}_total" if family.type == "counter" else family.name): family.type for family in families}
    shown = {name: row[1] for row in rows("Metrics") for name in re.findall(r"`(\w+)`", row[0])}
    assert shown == served
