"""TurboQuant Lab: what happens to answers, memory and speed when a model's KV cache is compressed.

Names load on first use, so that importing the package costs nothing.

Example:
    >>> from turboquant import build_cache, parse_method, tiny_model
    >>> model = tiny_model("llama")
    >>> cache = build_cache(model.config, parse_method("turboquant:bits=4"))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant.cache.build import NothingCompressedError, build_cache, cache_report
    from turboquant.methods import METHODS, Method, parse_method
    from turboquant.methods.scalar import TurboQuantMSE, TurboQuantProd
    from turboquant.models.dry_run import DryRunError, attach
    from turboquant.models.load import MODELS, load_model, tiny_model
    from turboquant.quant.codebook import expected_mse, lloyd_max
    from turboquant.quant.quantizer import PackedTensor, Quantizer
    from turboquant.records.comparison import Comparison, Settings
    from turboquant.run.compare import compare, compare_methods

__version__ = "0.1.0"
_HOME = {
    "cache.build": ("NothingCompressedError", "build_cache", "cache_report"),
    "quant.codebook": ("expected_mse", "lloyd_max"),
    "run.compare": ("compare", "compare_methods"),
    "methods": ("METHODS", "Method", "parse_method"),
    "methods.turboquant": ("TurboQuantMSE", "TurboQuantProd"),
    "models.dry_run": ("DryRunError", "attach"),
    "models.load": ("MODELS", "load_model", "tiny_model"),
    "quant.quantizer": ("PackedTensor", "Quantizer"),
    "records.comparison": ("Comparison", "Settings"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = [
    "METHODS",
    "MODELS",
    "Comparison",
    "DryRunError",
    "Method",
    "NothingCompressedError",
    "PackedTensor",
    "Quantizer",
    "Settings",
    "TurboQuantMSE",
    "TurboQuantProd",
    "attach",
    "build_cache",
    "cache_report",
    "compare",
    "compare_methods",
    "expected_mse",
    "lloyd_max",
    "load_model",
    "parse_method",
    "tiny_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'turboquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"turboquant.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
