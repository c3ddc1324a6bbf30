"""Prompts: a whole set of them through both caches, the most damaged first."""

import streamlit as st

from app.prompts import view as prompt_set
from app.ui import page, work

page.header(
    "Many prompts, the most damaged first",
    "Compression may leave one prompt untouched and change the answer to another. This page asks a whole set of them "
    "and sorts them by how far the model's predictions moved.",
)
st.caption(
    "The prompts run one after the other, each through both caches; they are not padded into one batch, so each figure "
    "is the one that Compare would give. The model and the method are those of the sidebar."
)
prompts, wrong = prompt_set.chooser()
work.bar(
    "Run the set",
    lambda: prompt_set.request(prompts),
    plan=prompt_set.plan(prompts),
    key="prompts_run",
    disabled=wrong,
)
prompt_set.ending()
job = prompt_set.last()
if job is None:
    page.empty("No set has run in this tab yet. Run the examples, or type prompts of your own.")
else:
    if job.live:
        work.watch(job)
    prompt_set.results(job)
page.copy_link()
