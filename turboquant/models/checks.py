"""What is asked of a model: before loading that the cache can serve it and that it fits, afterwards its precision."""

import contextlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turboquant.cache.build import compressed_layers
from turboquant.models.registry import ModelError, ModelSpec
from turboquant.models.sizes import layer_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Bytes a parameter takes. NF4 with double quantization: 4 bits, 8 more per 64 values, 32 more per 64 * 256 values.
BYTES_PER_PARAMETER = {"fp32": 4.0, "bf16": 2.0, "8bit": 1.0, "4bit": (4 + 8 / 64 + 32 / (64 * 256)) / 8}
MAX_CONFIG_BYTES = 1_000_000
MOST_LAYERS = 1024
"""Of layers and of experts; a config's class and the model's skeleton make an object for each."""


def check_config_file(path: Path, spec: ModelSpec) -> None:
    """Refuse a config.json that the library could not read in reasonable time and memory.

    Raises:
        ModelError: If it is too large, no JSON object, or counts more layers or experts than any model has.
    """
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ModelError(f"{spec.name} has a config.json of {size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read.")
    try:
        parsed = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{spec.name} has a config.json that is no JSON: choose another model.") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{spec.name} has a config.json that is no object with named fields: choose another model.")
    if (reason := too_many(parsed)) is not None:
        raise ModelError(unsupported(spec, reason))


def too_many(config: dict[str, Any]) -> str | None:
    """Say which number of layers or experts in a parsed config.json is larger than any model's; None where none is."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, part = waiting.pop()
        if isinstance(part, dict):
            waiting += [(str(inner), value) for inner, value in part.items()]
        elif isinstance(part, list):
            waiting += [(name, value) for value in part]
        elif type(part) is int and part > MOST_LAYERS and name.endswith(("layer", "layers", "experts", "types")):
            return f"its {name[:40]} must be at most {MOST_LAYERS}, got {str(part)[:40]}"
    return None


def auto_class(config: "PreTrainedConfig", spec: ModelSpec) -> Any:
    """Return the class of transformers that makes models of a configuration: of text, or of images and text.

    Raises:
        ModelError: If neither knows it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind
    raise ModelError(unsupported(spec, "it does not generate text token by token"))


def skeleton_of(config: "PreTrainedConfig", spec: ModelSpec) -> "PreTrainedModel":
    """Return the model without memory behind its weights, to count parameters and look at its kind.

    Raises:
        ModelError: If the configuration is not one of a causal language model.
    """
    kind = auto_class(config, spec)
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(unsupported(spec, "no model can be made from its configuration")) from error


def check_architecture(model: "PreTrainedModel", spec: ModelSpec) -> None:
    """Refuse what the compressed cache cannot serve, before the weights are read.

    Raises:
        ModelError: With the reason.
    """
    if (reason := why_not(model)) is not None:
        raise ModelError(unsupported(spec, reason))


def why_not(model: "PreTrainedModel") -> str | None:
    """Say why a model, with or without weights, has no attention that a compressed cache can serve; None where it may.

    What only a call can tell, the dry run finds out (`turboquant.models.dry_run`).
    """
    config = model.config.get_text_config(decoder=True)
    heads = layer_heads(config)
    head_dim = min((one.head_dim for one in heads), default=2)
    indexer = any(name.rpartition(".")[2] == "indexer" for name, _ in model.named_modules())
    reasons = {
        "it reads text with an encoder": bool(model.config.is_encoder_decoder),
        "an indexer chooses which tokens its attention sees": indexer,
        "it has no layers": not heads,
        "none of its layers keeps keys and values of all tokens": not compressed_layers(model.config),
        f"its head_dim is {head_dim} and must be at least 2": head_dim < 2,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def unsupported(spec: ModelSpec, why: str) -> str:
    """The sentence for a model the compressed cache cannot serve."""
    return (
        f"{spec.name} cannot be used here: {why}; "
        "choose a model with plain attention such as Llama, Qwen, Mistral, Phi or Gemma."
    )


def weight_bytes(skeleton: "PreTrainedModel", weights: str) -> int:
    """Bytes of the weights at a precision; bitsandbytes quantizes linear layers except the output head."""
    if weights in ("fp32", "bf16"):
        return int(sum(p.numel() for p in skeleton.parameters()) * BYTES_PER_PARAMETER[weights])
    head = skeleton.get_output_embeddings()
    linear = [m.weight for m in skeleton.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    quantized = sum(weight.numel() for weight in linear)
    rest = sum(p.numel() for p in skeleton.parameters()) - quantized
    return int(quantized * BYTES_PER_PARAMETER[weights] + rest * 2)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device; on the CPU a container's limit counts too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return free


def read_weights(model: "PreTrainedModel") -> str:
    """The precision the modules really have; of weights that are stored quantized, the name of the method."""
    kinds = Counter(type(module).__name__ for module in model.modules())
    if kinds["Linear4bit"] or kinds["Linear8bitLt"]:
        return "4bit" if kinds["Linear4bit"] >= kinds["Linear8bitLt"] else "8bit"
    if (packed := getattr(model.config, "quantization_config", None)) is not None:
        method = packed["quant_method"] if isinstance(packed, dict) else packed.quant_method
        return str(getattr(method, "value", method))
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    dtype = sizes.most_common(1)[0][0]
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).removeprefix("torch."))


def what_is_missing(error: ImportError) -> str:
    """Name the package that a model or its weights need, as transformers or Python name it."""
    texts = (r"requires (?:the )?([\w.-]+)(?: library)?,? but it was not found", r"pip install (?:-U )?['\"]?([\w.-]+)")
    named = next(filter(None, (re.search(text, str(error), re.IGNORECASE) for text in texts)), None)
    package = named.group(1).lower() if named else (error.name or "").partition(".")[0]
    if not package:
        return first_line(error)
    return f"it needs the package {package}, which is not installed here (pip install {package})"


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
