"""The pages of the app: a new page is one file in `pages/` and one line here."""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "pages"


class Entry(NamedTuple):
    """A page: its file (also its address), where it stands, and whether it uses the settings in the sidebar."""

    section: str
    name: str
    title: str
    icon: str
    uses_settings: bool
    help: str

    @property
    def path(self) -> Path:
        """Its file."""
        return FOLDER / f"{self.name}.py"


ENTRIES = (
    Entry(
        "", "compare", "Compare", "compare", True, "One prompt, answered with the full KV cache and a compressed one."
    ),
    Entry("", "prompts", "Prompts", "list_alt", True, "A set of prompts through both caches, the most damaged first."),
    Entry("", "session", "Session", "forum", True, "A conversation of several turns in two caches at once."),
    Entry("Look inside", "heads", "Heads", "grid_on", False, "Which attention heads are at risk, and why."),
    Entry("Look inside", "memory", "Memory", "memory", False, "What a KV cache needs and what fits on a GPU."),
    Entry("Look inside", "theory", "Theory", "school", False, "How TurboQuant works, in six measured figures."),
    Entry("Measure", "methods", "Methods", "scatter_plot", True, "Quality against bits held, for every method."),
    Entry("Measure", "seeds", "Seeds", "casino", True, "How much the result depends on the random seeds."),
    Entry("Measure", "needle", "Needle", "search", True, "Is a fact in a long text still found?"),
    Entry("Measure", "benchmarks", "Benchmarks", "speed", True, "Speed and memory, recorded and on this machine."),
    Entry("Keep", "runs", "Runs", "inventory_2", False, "The runs of this tab: compare two, export, import."),
    Entry("Keep", "about", "About", "info", False, "What the numbers mean, limits, versions, credits."),
)
DEFAULT = ENTRIES[0]
