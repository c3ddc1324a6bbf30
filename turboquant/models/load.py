"""Loading models: the built-in one, hub repositories and local folders, at the weight precision that was asked for.

Whatever goes wrong is a `ModelError` with one sentence. Nothing falls back silently: the precision in
`LoadedModel.weights` is read from the loaded modules, and a model that is not what was asked for is refused.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turboquant.kernels.codes import compile_kernels
from turboquant.models import embedded, hub
from turboquant.models.checks import (
    BYTES_PER_PARAMETER,
    auto_class,
    check_architecture,
    check_config_file,
    check_memory,
    read_weights,
    skeleton_of,
    unsupported,
    weight_bytes,
)
from turboquant.models.fingerprint import fingerprint_of
from turboquant.models.hub import available_models
from turboquant.models.registry import MODELS, ModelError, ModelSpec, UnknownNameError, find_spec, is_embedded, is_local
from turboquant.models.tiny import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "MODELS",
    "WEIGHTS",
    "LoadedModel",
    "ModelError",
    "ModelSpec",
    "available_models",
    "estimate_bytes",
    "load_model",
    "read_config",
    "resolve",
    "tiny_model",
]

WEIGHTS = ("auto", *BYTES_PER_PARAMETER)
Progress = Callable[[float, str], None]


@dataclass
class LoadedModel:
    """A model ready to run, with the attention function "turboquant" set.

    Attributes:
        model: In evaluation mode, gradients off.
        tokenizer: Its tokenizer, with a pad token.
        spec: Where it came from; the revision is the commit that was loaded.
        weights: Precision as read from the loaded modules: fp32, bf16, 8bit or 4bit.
        device: Where the weights are.
        fingerprint: Of the files that it was loaded from (see `models.fingerprint`); None where it came otherwise.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    spec: ModelSpec
    weights: str
    device: str
    fingerprint: str | None = None


def load_model(
    name: str, *, weights: str = "auto", device: str = "auto", progress: Progress | None = None
) -> LoadedModel:
    """Load a model and its tokenizer.

    A complete copy on this machine is used without asking the network. Code from a repository never runs and only
    safetensors weights are read (the built-in model comes from GGUF).

    Args:
        name: Key of `MODELS`, hub id `organisation/name`, or path of a local folder.
        weights: One of `WEIGHTS`; "auto" is 4bit on CUDA and fp32 on the CPU.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        progress: Called with a fraction 0 to 1 and a text.

    Raises:
        ModelError: If the model cannot be loaded as asked; the message says what to do.
    """
    report = progress or (lambda fraction, text: None)
    weights, target = resolve(weights, device)
    spec = find_spec(name)
    with _library_errors(spec, target):
        folder = _folder_with_config(spec, lambda fraction, text: report(0.6 * fraction, text))
        config = _config(folder, spec)
        skeleton = skeleton_of(config, spec)
        check_architecture(skeleton, spec)
        check_memory(weight_bytes(skeleton, weights), weights, target, spec)
        if not hub.has_weights(folder):
            if is_local(spec):
                raise ModelError(hub.no_safetensors(str(folder)))
            folder = hub.download(spec, folder, lambda f, text: report(0.05 + 0.55 * f, text), available_models())
        if not is_local(spec) and not is_embedded(spec):
            spec = replace(spec, revision=folder.name)
        report(0.65, f"Loading {spec.name}")
        files = fingerprint_of(spec, folder)
        model = _load_weights(auto_class(config, spec), folder, weights, target, spec)
        if (found := read_weights(model)) != weights:
            raise ModelError(
                f"{spec.name} was asked for as {weights} but its weights are {found}: choose other weights."
            )
        report(0.9, "Loading the tokenizer")
        tokenizer = _tokenizer(folder)
        if is_local(spec) and fingerprint_of(spec, folder) != files:
            raise ModelError(f"{spec.name} was changed while it was loaded: load it again.")
    if not spec.parameters:
        spec = replace(spec, parameters=sum(p.numel() for p in skeleton.parameters()) / 1e9)
    _try_out(model, spec)
    if target.type == "cpu":
        report(0.95, "Compiling the kernels")
        compile_kernels()
    report(1.0, f"{spec.name} is ready")
    return LoadedModel(model, tokenizer, spec, found, str(target), files)


def read_config(name: str) -> "PreTrainedConfig":
    """Return a model's configuration; of a hub model nothing else is fetched.

    Raises:
        ModelError: If there is no such model or its configuration cannot be read.
    """
    spec = find_spec(name)
    with _library_errors(spec, torch.device("cpu")):
        return _config(_folder_with_config(spec, lambda fraction, text: None), spec)


def resolve(weights: str = "auto", device: str = "auto") -> tuple[str, torch.device]:
    """Return the precision and the device that `load_model` would take.

    Raises:
        ModelError: If there is no such precision or device.
    """
    target = _device(device)
    return _weights(weights, target), target


def estimate_bytes(name_or_config: "str | PreTrainedConfig", weights: str) -> int:
    """Estimate the memory the weights alone take.

    From a configuration every parameter is counted, and embeddings stay 16-bit under 8bit and 4bit. From a name the
    registry's parameter count is used, and 4bit and 8bit assume that a tenth of it stays 16-bit.

    Args:
        name_or_config: Name known to `find_spec` with a parameter count, or a model configuration.
        weights: fp32, bf16, 8bit or 4bit.

    Raises:
        ModelError: If the name is not known or its size is not known before loading.
        ValueError: If `weights` is no precision.
    """
    if weights not in BYTES_PER_PARAMETER:
        raise ValueError(f"weights must be one of {', '.join(BYTES_PER_PARAMETER)}, got {weights!r}")
    if not isinstance(name_or_config, str):
        spec = ModelSpec(name_or_config.model_type, name_or_config.model_type, None, "")
        return weight_bytes(skeleton_of(name_or_config, spec), weights)
    spec = find_spec(name_or_config)
    if not spec.parameters:
        raise ModelError(f"The size of {spec.name} is not known before its configuration is read.")
    share = 0.0 if weights in ("fp32", "bf16") else 0.1
    return int(spec.parameters * 1e9 * ((1 - share) * BYTES_PER_PARAMETER[weights] + share * 2))


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UnknownNameError(f"Unknown device {device!r}: use auto, cpu, cuda or cuda:<index>.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnknownNameError(f"Unknown device {device!r}: use auto, cpu, cuda or cuda:<index>.")
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise ModelError(
                f"Device {device} is not there: this machine offers {count} CUDA devices; use auto or cpu."
            )
        return torch.device("cuda", chosen.index or 0)
    return chosen


def _weights(weights: str, device: torch.device) -> str:
    if weights not in WEIGHTS:
        raise UnknownNameError(f"Unknown weights {weights!r}: use one of {', '.join(WEIGHTS)}.")
    if weights == "auto":
        return "4bit" if device.type == "cuda" else "fp32"
    return weights


def _folder_with_config(spec: ModelSpec, progress: Progress) -> Path:
    """The folder that holds the model's configuration; for a hub model the weights may still be missing."""
    if is_embedded(spec):
        return embedded.embedded_folder(progress)
    if not is_local(spec):
        progress(0.0, f"Looking for {spec.name}")
        return hub.cached_folder(spec) or hub.download_config(spec, available_models())
    if not (Path(spec.hub_id) / "config.json").is_file():
        raise ModelError(f"{spec.hub_id} holds no model: there is no config.json in it.")
    return Path(spec.hub_id)


def _config(folder: Path, spec: ModelSpec) -> "PreTrainedConfig":
    from transformers import AutoConfig

    check_config_file(folder / "config.json", spec)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever its class makes of values that nobody has checked
        raise ModelError(
            f"{spec.name} has a configuration that this version of transformers does not know: choose another model."
        ) from error
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method:
        raise ModelError(
            f"{spec.name} is stored already quantized ({method}): choose the original repository, "
            "weights=4bit quantizes it on loading."
        )
    return config


def _load_weights(kind: Any, folder: Path, weights: str, device: torch.device, spec: ModelSpec) -> "PreTrainedModel":
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32 if weights == "fp32" else torch.bfloat16}
    if weights == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    elif weights == "8bit":  # its kernels compute in float16
        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": torch.float16}
    if weights in ("4bit", "8bit") or device.type == "cuda":
        options["device_map"] = {"": str(device)}
    loaded: Any = kind.from_pretrained(
        folder,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{spec.name} lacks {len(missing)} of its weights, {missing[0]} among them: fetch its files again."
        )
    if is_local(spec) and device.type == "cpu":
        _take_out_of_files(model)
    return model


def _take_out_of_files(model: "PreTrainedModel") -> None:
    """Copy weights, which may lie in the mapped file: what is written into it later would change them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # quantized ones were made anew
            tensor.data = tensor.data.clone()


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _try_out(model: "PreTrainedModel", spec: ModelSpec) -> None:
    """Set the attention function, and ask the model whether it still says the same."""
    from turboquant.models.dry_run import DryRunError, dry_run

    model.eval().requires_grad_(False)
    try:
        dry_run(model)
    except DryRunError as error:
        raise ModelError(unsupported(spec, str(error))) from error


@contextlib.contextmanager
def _library_errors(spec: ModelSpec, device: torch.device) -> Iterator[None]:
    """Silence the libraries' progress bars and turn their errors into sentences."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(
            f"Memory ran out on {device} while loading {spec.name}: "
            "choose fewer bits for the weights or a smaller model."
        ) from error
    except ImportError as error:
        raise ModelError(f"{spec.name} cannot be loaded: {_what_is_missing(error)}.") from error
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{spec.name} cannot be loaded: {_first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _what_is_missing(error: ImportError) -> str:
    """Name the package that a model or its weights need, as transformers or Python name it."""
    named = re.search(r"requires (?:the )?([\w.-]+)(?: library)?,? but it was not found", str(error), re.IGNORECASE)
    package = named.group(1).lower() if named else error.name
    if not package:
        return _first_line(error)
    return f"it needs the package {package}, which is not installed here (pip install {package})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
