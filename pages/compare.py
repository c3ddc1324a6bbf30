"""Compare: one prompt, answered with the full KV cache and with one or two compressed ones."""

import streamlit as st

from app.compare import live_view as live
from app.compare import prompt_view as prompt
from app.compare import view as result
from app.tab import state
from app.ui import page, share

job = live.newest()
methods = job.request.methods if job is not None else ()
at_work = job is not None and job.live  # asked once: a run that ends while the page is drawn is collected by the rerun
state.collect()
page.header(
    "Same prompt, two caches",
    "One model answers the same prompt at once with its full KV cache and with a cache that really is compressed, or "
    "with two of them. Then see where the answers part, what was saved and what it cost.",
)
prompt.render()

if job is not None and at_work:
    live.stream(job, methods)
    st.rerun()

live.ending(job, methods)
runs = share.chooser()
if runs:
    result.render(runs)
else:
    st.info("No run yet. Pick an example and press Compare.", icon=":material/compare:")
share.importer()
