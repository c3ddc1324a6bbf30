"""Needle: is a fact hidden in a long text still found when the cache is compressed?"""

from app.needle import view as needle
from app.tab import state
from app.tab.measure import present
from app.ui import page, work
from app.ui.measuring import RECORDED

page.header(
    "Is a fact in a long text still found?",
    "A sentence with a number is hidden in a long text, and the model is asked for the number at the end. It answers "
    "from its full KV cache and from compressed ones, at every length of the text and depth of the hidden sentence "
    "that you choose. The sidebar sets model and method; a second setting there adds a second method.",
)
measurement = needle.MEASUREMENT
needle.controls()
plan = measurement.plan()
measurement.run_bar(plan)
measurement.ending()
shown = measurement.view()

if shown == RECORDED:
    records = needle.recorded()
    measurement.source(records, shown, needle.files(records))
    if records:
        needle.maps(records)
        needle.replies(records)
    else:
        page.empty("No recorded method is chosen, or none is shipped with this app.")
elif job := measurement.working():
    cells = measurement.asked(plan)
    work.watch(job)
    needle.maps(present(cells, state.current_records()), cells)
else:
    records = present(plan.cells, state.current_records())
    measurement.source(records, shown, needle.files(records))
    if records:
        needle.maps(records, plan.cells)
        needle.replies(records)
    else:
        page.empty(
            "Nothing is measured in this tab with these settings yet. Press Measure, or look at the recorded maps."
        )
