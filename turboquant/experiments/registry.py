"""What is asked of a model under a cache: needles, perplexity, generation, attention. One file an experiment.

Each `Experiment` that a module of this package defines is found here. Its settings are a record in
`turboquant.records.settings`, whose fields become the cell's settings; its `run` measures any number of methods against
the full cache and shares what they have in common. Texts are read with `turboquant.texts.read_text`, which notes them
for the record.
"""

import importlib
import pkgutil
from typing import Any

from turboquant import experiments
from turboquant.experiments.base import Experiment

_modules = [info.name for info in pkgutil.iter_modules(experiments.__path__)]
EXPERIMENTS: dict[str, Experiment[Any]] = {
    found.name: found
    for name in _modules
    if name != "registry"
    for found in vars(importlib.import_module(f"{experiments.__name__}.{name}")).values()
    if isinstance(found, Experiment)
}
