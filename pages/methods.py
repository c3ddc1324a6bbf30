"""Methods: every way to compress the cache, quality against the bits that it really holds."""

from app.methods import view as methods
from app.methods.request import alike, what_was_read
from app.recommend import view as recommend
from app.tab import state
from app.ui import page, work
from app.ui.measuring import HERE, RECORDED

page.header(
    "What quality costs in bits",
    "There are many ways to store a KV cache in fewer bits. Here each one reads the same texts, and its predictions "
    "are held against those of the full cache: the less they move (KL) and the fewer bits a value takes, the better. "
    "The recorded comparison has every method; you can measure others here, on the model chosen in the sidebar. "
    "The search at the foot of the page recommends a setting.",
)
measurement = methods.MEASUREMENT
shown = measurement.view()
methods.controls(shown)
plan = measurement.plan()
measurement.run_bar(plan, shortcuts=not recommend.own_text())
measurement.ending()
job = measurement.working()

if shown == RECORDED:
    records = state.recorded("methods")
    words = "No recorded comparison is shipped with this app. Press Measure to make one."
else:
    records = alike(measurement.asked(plan), state.current_records())
    words = "Nothing is measured in this tab with these settings yet. Press Measure, or look at the recorded results."

if records or job is not None:
    methods.bits_switch()
if job is not None and shown == HERE:
    work.watch(job)
    methods.plot(records)
else:
    measurement.source(records, shown, methods.files(records), what_was_read(records))
    if records:
        methods.plot(records)
        methods.details(methods.table(records))
    else:
        page.empty(words)
recommend.section()
