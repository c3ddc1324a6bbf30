"""Compare: one prompt, answered with the full KV cache and with a compressed one."""

import streamlit as st

from app import state
from app.components import live, prompt, result, share

job = state.job()
at_work = job is not None and job.live  # asked once: a run that ends while the page is drawn is collected by the rerun
state.collect()
st.title("Same prompt, two caches", anchor=False)
st.markdown(
    "One model answers twice at once: with its full KV cache, and with a cache that really is compressed. "
    "Then see where the answers part, what was saved and what it cost."
)
prompt.render()

if job is not None and at_work:
    live.stream(job)
    st.rerun()

live.ending(job)
run = share.chooser()
if run is None:
    st.info("No run yet. Pick an example and press Compare.", icon=":material/compare:")
else:
    result.render(run)
share.importer()
