"""Benchmarks: speed and memory of the whole generation loop, recorded and measured on this machine."""

from app import state
from app.components import benchmarks, page, work

page.header(
    "What compression costs and saves",
    "A compressed cache holds fewer bytes, but packing it and reading it back takes time. This page shows both, next "
    "to the full cache on the same machine: recorded results, and those that you measure here.",
)
if benchmarks.chooser() == benchmarks.RECORDED:
    work.ending("benchmarks")
    benchmarks.recorded()
else:
    benchmarks.controls()
    plan = benchmarks.run_bar()
    work.ending("benchmarks")
    job = state.job()
    if job is not None and job.live and job.request.page == "benchmarks":
        work.watch(job, lambda: benchmarks.measured(plan))
    else:
        benchmarks.measured(plan)
