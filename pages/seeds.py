"""Seeds: how far results move with the random rotation and the random draws, and which differences are real."""

from app import state
from app.components import page, seeds, work

page.header(
    "How much is luck",
    "Compression here begins with a random rotation, and answers may be drawn at random. Measured again with other "
    "seeds, every figure comes out a little different. This page shows how far figures move, and whether two numbers "
    "of bits differ by more than that.",
)
show, metric = seeds.chooser()
if show == seeds.RECORDED:
    work.ending("seeds")
    seeds.recorded(metric)
else:
    seeds.controls()
    plan = seeds.run_bar()
    work.ending("seeds")
    job = state.job()
    if job is not None and job.live and job.request.page == "seeds":
        work.watch(job, lambda: seeds.measured(plan, metric))
    else:
        seeds.measured(plan, metric)
