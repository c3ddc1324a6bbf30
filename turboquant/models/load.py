"""Loading models at the precision that was asked for: the built-in one, of the hub, of a folder or a GGUF file.

Whatever goes wrong is a `ModelError` with one sentence. Nothing falls back silently: the precision in
`LoadedModel.weights` is read from the loaded modules, and a model that is not what was asked for is refused.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turboquant.kernels.codes import compile_kernels
from turboquant.models import embedded, gguf_file, hub, placement, stored
from turboquant.models.checks import (
    BYTES_PER_PARAMETER,
    auto_class,
    check_architecture,
    check_config_file,
    first_line,
    read_weights,
    skeleton_of,
    unsupported,
    weight_bytes,
    what_is_missing,
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
        weights: Precision as read from the loaded modules: fp32, bf16, 8bit or 4bit; of weights that were stored
            quantized and are kept so, the method, such as gptq.
        device: Where the weights are; of several devices the first, which takes the tokens.
        fingerprint: Of the files that it was loaded from (see `models.fingerprint`); None where it came otherwise.
        stored: How the weights are stored, where that is no plain number: mxfp4, fp8, GGUF Q4_1.
        placement: Where the layers are: a device, or "24 layers on cuda:0, 8 on cpu"; empty where that is `device`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    spec: ModelSpec
    weights: str
    device: str
    fingerprint: str | None = None
    stored: str | None = None
    placement: str = ""


def load_model(
    name: str, *, weights: str = "auto", device: str = "auto", progress: Progress | None = None
) -> LoadedModel:
    """Load a model and its tokenizer.

    A complete copy on this machine is used without asking the network. Code from a repository never runs and only
    safetensors and GGUF weights are read. Weights that are stored quantized are loaded as `models.stored` says.

    Args:
        name: Key of `MODELS`, hub id `organisation/name`, or path of a local folder or GGUF file.
        weights: One of `WEIGHTS`; "auto" is 4bit on CUDA and fp32 on the CPU, or as `models.stored` says.
        device: "auto", "cpu", "cuda" or "cuda:<index>". "auto" is one GPU where the weights fit on one, else all GPUs
            and the CPU together; without a GPU it is the CPU.
        progress: Called with a fraction 0 to 1 and a text.

    Raises:
        ModelError: If the model cannot be loaded as asked; the message says what to do.
    """
    report = progress or (lambda fraction, text: None)
    precision, target = resolve(weights, device)
    spec = find_spec(name)
    with _library_errors(spec, target):
        source = _source(spec, target, lambda fraction, text: report(0.6 * fraction, text))
        skeleton = skeleton_of(source.config, spec)
        check_architecture(skeleton, spec)
        if source.stored is not None:
            precision = source.stored.choose(weights, spec)
        parameters = sum(p.numel() for p in skeleton.parameters())
        devices = placement.devices_of(target, device)
        place = placement.find_place(_sizes(skeleton, source.stored), precision, devices, spec, parameters)
        if source.header is None and not hub.has_weights(source.path):
            source.path = _fetched(source.path, spec, lambda f, text: report(0.05 + 0.55 * f, text))
        if not is_local(spec) and not is_embedded(spec):
            spec = replace(spec, revision=source.path.name)
        report(0.65, f"Loading {spec.name}")
        files = fingerprint_of(spec, source.path)
        model = _load_weights(source, precision, place, spec)
        if (found := read_weights(model)) != precision:
            raise ModelError(
                f"{spec.name} was asked for as {precision} but its weights are {found}: choose other weights."
            )
        report(0.9, "Loading the tokenizer")
        tokenizer = _tokenizer(source.path, spec)
        if is_local(spec) and fingerprint_of(spec, source.path) != files:
            raise ModelError(f"{spec.name} was changed while it was loaded: load it again.")
    if not spec.parameters:
        spec = replace(spec, parameters=parameters / 1e9)
    _try_out(model, spec)
    if target.type == "cpu":
        report(0.95, "Compiling the kernels")
        compile_kernels()
    kept = None if source.stored is None else source.stored.name
    words = placement.placement(model) if len(place) > 1 else ""
    first = place[0] if len(place) == 1 or model.device.type == "meta" else model.device
    before = f" from {kept}" if kept not in (None, found) else ""
    report(1.0, f"{spec.name} is ready: weights {found}{before}, {words or first}")
    return LoadedModel(model, tokenizer, spec, found, str(first), files, kept, words)


@dataclass
class _Source:
    """What a model is made from: the folder or GGUF file, what it says, and how its weights are stored."""

    path: Path
    config: "PreTrainedConfig"
    stored: stored.Stored | None
    header: gguf_file.Header | None = None


def _source(spec: ModelSpec, device: torch.device, progress: Progress) -> _Source:
    path = Path(spec.hub_id)
    if is_local(spec) and gguf_file.is_gguf(path) and path.is_file():
        progress(0.0, f"Reading {spec.name}")
        header = gguf_file.read_header(path)
        return _Source(path, gguf_file.read_config(header), stored.of_file(header, device), header)
    folder = _folder_with_config(spec, progress)
    config = _config(folder, spec)
    return _Source(folder, config, stored.of_config(config, device, spec))


def _sizes(skeleton: "PreTrainedModel", kept: stored.Stored | None) -> dict[str, int]:
    """The bytes of the weights at each precision that they can be loaded as."""
    packed = {} if kept is None else {name: "4bit" if kept.bits <= 4 else "8bit" for name in kept.weights}
    choices = BYTES_PER_PARAMETER if kept is None else kept.weights
    return {one: weight_bytes(skeleton, one if one in BYTES_PER_PARAMETER else packed[one]) for one in choices}


def _fetched(folder: Path, spec: ModelSpec, progress: Progress) -> Path:
    """The folder with all files of a model of the hub."""
    if is_local(spec) and (other := _other_file(folder)):
        raise ModelError(f"{folder} has no complete safetensors weights{other}.")
    if is_local(spec):
        raise ModelError(hub.no_safetensors(str(folder)))
    return hub.download(spec, folder, progress, available_models())


def read_config(name: str) -> "PreTrainedConfig":
    """Return a model's configuration; of a hub model nothing else is fetched.

    Raises:
        ModelError: If there is no such model or its configuration cannot be read.
    """
    spec = find_spec(name)
    with _library_errors(spec, torch.device("cpu")):
        return _source(spec, torch.device("cpu"), lambda fraction, text: None).config


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
    folder = Path(spec.hub_id)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: there is no config.json in it{_other_file(folder)}.")
    return folder


def _other_file(folder: Path) -> str:
    """The end of a sentence: a GGUF file in a folder that holds no model of transformers."""
    files = sorted(path.name for path in folder.iterdir() if gguf_file.is_gguf(path))
    return f"; for the model in {files[0]} give the path of that file" if files else ""


def _config(folder: Path, spec: ModelSpec) -> "PreTrainedConfig":
    from transformers import AutoConfig

    check_config_file(folder / "config.json", spec)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever its class makes of values that nobody has checked
        if "auto_map" in json.loads((folder / "config.json").read_bytes()):
            raise ModelError(
                f"{spec.name} comes with code of its own, which never runs here: choose one that transformers knows."
            ) from error
        raise ModelError(
            f"{spec.name} has a configuration that this version of transformers does not know: choose another model."
        ) from error
    return config


def _load_weights(source: _Source, weights: str, place: Sequence[torch.device], spec: ModelSpec) -> "PreTrainedModel":
    kept = source.stored
    packed = weights in ("8bit", "4bit") or kept is not None
    how = {**_precision(weights, kept), **placement.options(place, packed=packed), "trust_remote_code": False}
    kind = auto_class(source.config, spec)
    if source.header is not None:
        model, info = gguf_file.read_model(kind, source.header, source.config, **how)
    else:
        loading: Any = kind.from_pretrained
        files = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        model, info = loading(source.path, **files, **how)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{spec.name} lacks {len(missing)} of its weights, {missing[0]} among them: fetch its files again."
        )
    placement.check_nothing_on_disk(model, spec)
    if kept is not None and weights in stored.PLAIN:
        stored.unify(model, how["dtype"])
    if is_local(spec) and len(place) == 1 and place[0].type == "cpu":
        _take_out_of_files(model)
    return model


def _precision(weights: str, kept: stored.Stored | None) -> dict[str, Any]:
    """What `from_pretrained` is to be told of the precision."""
    from transformers import BitsAndBytesConfig

    if weights in stored.PLAIN:
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        return {"dtype": dtype, **({} if kept is None else kept.options)}
    if kept is not None:  # as they are, with the numbers around them as the repository has them
        return {"dtype": "auto"}
    if weights == "8bit":  # its kernels compute in float16
        return {"dtype": torch.float16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"dtype": torch.bfloat16, "quantization_config": config}


def _take_out_of_files(model: "PreTrainedModel") -> None:
    """Copy weights, which may lie in the mapped file: what is written into it later would change them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # quantized ones were made anew
            tensor.data = tensor.data.clone()


def _tokenizer(path: Path, spec: ModelSpec) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        with gguf_file.alone(path) as alone:
            tokenizer = AutoTokenizer.from_pretrained(
                **gguf_file.options(alone), trust_remote_code=False, local_files_only=True
            )
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the tokenizers' own errors have no other class
        raise ModelError(
            f"{spec.name} comes without a tokenizer that transformers reads ({first_line(error)[:120]})."
        ) from error
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
        raise ModelError(f"{spec.name} cannot be loaded: {what_is_missing(error)}.") from error
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{spec.name} cannot be loaded: {first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
