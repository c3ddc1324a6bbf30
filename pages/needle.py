"""Needle: is a fact hidden in a long text still found when the cache is compressed?"""

from app import state
from app.components import needle, page, work

page.header(
    "Is a fact in a long text still found?",
    "A sentence with a number is hidden in a long text, and the model is asked for the number at the end. It answers "
    "from its full KV cache and from compressed ones, at every length of the text and depth of the hidden sentence "
    "that you choose. The sidebar sets model and method; a second setting there adds a second method.",
)
chosen = needle.controls()
plan = needle.plan(chosen)
needle.run_bar(chosen, plan)
work.ending("needle")
shown = needle.view()
job = needle.working(state.job())
cells = needle.planned(plan, job)

if shown == needle.RECORDED:
    records = needle.recorded()
    needle.source(records, shown)
    if records:
        needle.maps(records)
        needle.replies(records)
    else:
        page.empty("No recorded method is chosen, or none is shipped with this app.")
elif job is not None:
    needle.watch(job)
    needle.maps(needle.here(cells), cells)
else:
    records = needle.here(cells)
    needle.source(records, shown)
    if records:
        needle.maps(records, cells)
        needle.replies(records)
    else:
        page.empty(
            "Nothing is measured in this tab with these settings yet. Press Measure, or look at the recorded maps."
        )
