"""Memory: what a KV cache takes, from a model's config.json alone, and what fits on a GPU."""

from app.memory import view as sizing
from app.ui import page

page.header(
    "How long a context fits",
    "While it writes, a language model keeps a key and a value for every token it has read: the KV cache. On long "
    "texts it outgrows the weights. This page computes its size for a model you choose, in full and compressed, and "
    "what fits beside the weights on a GPU. No model is loaded; every figure is an estimate unless marked measured.",
)
plan = sizing.plan(sizing.controls())
if plan is not None:
    sizing.about(plan)
    sizing.figures_row(plan)
    sizing.export(plan)
    sizing.show_charts(plan, sizing.measured(plan))
    sizing.methods(plan)
    sizing.formula(plan)
