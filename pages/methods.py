"""Methods: every way to compress the cache, quality against the bits that it really holds."""

from app import state
from app.components import methods, page, work

page.header(
    "What quality costs in bits",
    "There are many ways to store a KV cache in fewer bits. Here each one reads the same texts, and its predictions "
    "are held against those of the full cache: the less they move (KL) and the fewer bits a value takes, the better. "
    "The recorded comparison has every method; you can measure others here, on the model chosen in the sidebar.",
)
shown = methods.view()
chosen = methods.controls(shown)
plan = methods.plan(chosen)
methods.run_bar(chosen, plan)
work.ending("methods")
job = methods.working(state.job())

if shown == methods.RECORDED:
    records = state.recorded("methods")
    words = "No recorded comparison is shipped with this app. Press Measure to make one."
else:
    records = methods.here(plan, job)
    words = "Nothing is measured in this tab with these settings yet. Press Measure, or look at the recorded results."

if records or job is not None:
    methods.bits_switch()
if job is not None and shown == methods.HERE:
    methods.watch(job)
    methods.plot(records)
elif records:
    methods.source(records, shown)
    methods.plot(records)
    methods.details(methods.table(records))
else:
    page.empty(words)
