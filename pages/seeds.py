"""Seeds: how far results move with the random rotation and the random draws, and which differences are real."""

from app.seeds import view as seeds
from app.ui import page, work
from app.ui.measuring import RECORDED

page.header(
    "How much is luck",
    "Compression here begins with a random rotation, and answers may be drawn at random. Measured again with other "
    "seeds, every figure comes out a little different. This page shows how far figures move, and whether two numbers "
    "of bits differ by more than that.",
)
shown, metric = seeds.chooser()
if shown == RECORDED:
    seeds.MEASUREMENT.ending()
    seeds.recorded(metric)
else:
    seeds.controls()
    plan = seeds.MEASUREMENT.plan()
    seeds.MEASUREMENT.run_bar(plan)
    seeds.MEASUREMENT.ending()
    if job := seeds.MEASUREMENT.working():
        work.watch(job)
    seeds.measured(plan, metric)
