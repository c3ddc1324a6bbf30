"""What is asked of a model under a cache: needles, perplexity, generation, attention. One file an experiment.

Each module has its settings (a pydantic record, whose fields become the cell's settings) and an `EXPERIMENT`, whose
`run` measures any number of methods against the full cache and shares what they have in common. Texts are read with
`turboquant.texts.read_text`, which notes them for the record.
"""

import importlib
import pkgutil
from typing import Any

from turboquant import experiments
from turboquant.experiments.base import Experiment

EXPERIMENTS: dict[str, Experiment[Any]] = {}

for _info in pkgutil.iter_modules(experiments.__path__):
    _module = importlib.import_module(f"{experiments.__name__}.{_info.name}")
    if hasattr(_module, "EXPERIMENT"):
        EXPERIMENTS[_module.EXPERIMENT.name] = _module.EXPERIMENT
