"""The router: page settings, sidebar, navigation. Runs at every interaction, so it stays cheap."""

import sys
from pathlib import Path

import streamlit as st

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from app import state  # noqa: E402
from app.components import sidebar  # noqa: E402

# Section, file, title, icon, does it use the sidebar's settings, what it is for.
PAGES = (
    (
        "",
        "compare",
        "Compare",
        "compare",
        True,
        "One prompt, answered with the full KV cache and a compressed one.",
    ),
    ("", "prompts", "Prompts", "list_alt", True, "A whole set of prompts through both caches, the most damaged first."),
    ("", "session", "Session", "forum", True, "A conversation of several turns in two caches at once."),
    ("Look inside", "heads", "Heads", "grid_on", False, "Which attention heads are at risk, and why."),
    ("Look inside", "memory", "Memory", "memory", False, "What a KV cache needs and what fits on a GPU."),
    ("Look inside", "theory", "Theory", "school", False, "How TurboQuant works, in six measured figures."),
    ("Measure", "methods", "Methods", "scatter_plot", True, "Quality against bits held, for every method."),
    ("Measure", "seeds", "Seeds", "casino", True, "How much the result depends on the random seeds."),
    ("Measure", "needle", "Needle", "search", True, "Is a fact in a long text still found?"),
    ("Measure", "benchmarks", "Benchmarks", "speed", True, "Speed and memory, recorded and on this machine."),
    ("Keep", "runs", "Runs", "inventory_2", False, "The runs of this tab: compare two, export, import."),
    ("Keep", "about", "About", "info", False, "What the numbers mean, limits, versions, credits."),
)
DEFAULT = "compare"

st.set_page_config(page_title="TurboQuant Lab", page_icon=str(ROOT / "assets" / "favicon.svg"), layout="wide")
st.logo(str(ROOT / "assets" / "logo.svg"), size="large", icon_image=str(ROOT / "assets" / "favicon.svg"))
sections: dict[str, list[st.Page]] = {}  # type: ignore[valid-type]
for section, name, title, icon, _, words in PAGES:
    path = ROOT / "pages" / f"{name}.py"
    if path.exists():
        kind = {"title": title, "icon": f":material/{icon}:", "help": words}
        entry = st.Page(path, url_path="start" if name == DEFAULT else name, default=name == DEFAULT, **kind)  # type: ignore[arg-type]
        sections.setdefault(section, []).append(entry)
        if name == DEFAULT:  # Streamlit gives the default page the bare address only; this makes /compare work too
            sections[section].append(st.Page(path, url_path=name, visibility="hidden", **kind))
page = st.navigation(sections, expanded=True)
state.attend()
state.collect()
sidebar.render(settings=any(page.title == title and uses for _, _, title, _, uses, _ in PAGES))
page.run()
