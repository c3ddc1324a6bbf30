"""Benchmarks: speed and memory of the whole generation loop, recorded and measured on this machine."""

from app.benchmarks import view as benchmarks
from app.ui import page, work
from app.ui.measuring import RECORDED

page.header(
    "What compression costs and saves",
    "A compressed cache holds fewer bytes, but packing it and reading it back takes time. This page shows both, next "
    "to the full cache on the same machine: recorded results, and those that you measure here.",
)
measurement = benchmarks.MEASUREMENT
if measurement.view() == RECORDED:
    measurement.ending()
    benchmarks.recorded()
else:
    benchmarks.controls()
    plan = measurement.plan()
    measurement.run_bar(plan)
    measurement.ending()
    if job := measurement.working():
        work.watch(job)
    benchmarks.measured(plan)
