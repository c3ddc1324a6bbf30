"""Heads: which attention heads look at another token once the keys are compressed, and why."""

import streamlit as st

from app.heads import attention_charts as attention
from app.heads import charts
from app.heads import view as heads
from app.tab import state
from app.ui import definitions, figures, page
from app.ui.panes import escape

page.header(
    "Which heads are at risk, and why",
    "To write its next token, a model looks back at earlier ones through many attention heads. This page shows which "
    "heads look at another token once the keys they compare with are compressed, and what tips them over.",
)
run = heads.chooser(state.all_runs())
if run is None:
    page.empty("No run yet. Compare a prompt first, or open the recorded example.", "compare", "Compare a prompt")
    st.stop()
c = run.comparison
with st.container(horizontal=True, vertical_alignment="center"):
    page.tag(run.origin, escape(run.where))
    page.copy_link()
    page.downloads(
        f"heads-{run.id}",
        [
            page.File("Heads as CSV", ".csv", "text/csv", run.heads_csv),
            page.File("Run as JSON", ".json", "application/json", run.to_json),
        ],
    )
if c.heads is None or not any(c.heads.packed.per_head_top1):
    words = " ".join(c.notes) or "No head was measured in this run: it was stopped before, or its method has no codes."
    page.empty(escape(words), "compare", "Compare a prompt")
    st.stop()

part, metric, chosen = heads.controls(run)
heads.overview(run, part, metric, chosen)

st.subheader(f"Layer {chosen[0]}, head {chosen[1]}", anchor=False)
if missing := heads.missing_detail(run, chosen):
    st.info(missing, icon=":material/info:")
else:
    one = heads.position(run, chosen, part)
    st.markdown(f"**Why:** {escape(attention.why(one))}", help=definitions.HEAD_SCORES)
    figures.show("Attention over tokens", attention.attention(one), "attention", help=definitions.ATTENTION)
    left, right = st.columns([3, 2], gap="medium")
    with left:
        heads.tokens_table(one)
    with right:
        figures.show("Scores, token by token", attention.scores(one), "scores", help=definitions.HEAD_SCORES)
if c.attention is not None:
    st.subheader("All heads: margin against error", anchor=False)
    st.markdown(
        "A head's top token changes where compression moves two scores past each other. What protects a head is its "
        "margin; what endangers it is the error. Heads near or above the dotted line have no room to spare."
    )
    figures.show("Top-1 margin and error of scores", charts.margins(c, chosen), "margins", help=definitions.MARGIN)
