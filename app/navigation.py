"""The pages of the app: a new page is one file in `pages/` and one line here."""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "pages"


class Entry(NamedTuple):
    """A page: its file (also its address), its place, and whether it uses the sidebar's settings."""

    section: str
    name: str
    title: str
    icon: str
    uses_settings: bool

    @property
    def path(self) -> Path:
        """Its file."""
        return FOLDER / f"{self.name}.py"


ENTRIES = (
    Entry("", "compare", "Compare", "compare", True),
    Entry("", "prompts", "Prompts", "list_alt", True),
    Entry("", "session", "Session", "forum", True),
    Entry("Look inside", "heads", "Heads", "grid_on", False),
    Entry("Look inside", "memory", "Memory", "memory", False),
    Entry("Look inside", "theory", "Theory", "school", False),
    Entry("Measure", "methods", "Methods", "scatter_plot", True),
    Entry("Measure", "seeds", "Seeds", "casino", True),
    Entry("Measure", "needle", "Needle", "search", True),
    Entry("Measure", "benchmarks", "Benchmarks", "speed", True),
    Entry("Keep", "runs", "Runs", "inventory_2", False),
    Entry("Keep", "about", "About", "info", False),
)
DEFAULT = ENTRIES[0]
