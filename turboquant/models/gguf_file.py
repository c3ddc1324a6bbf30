"""Models in one GGUF file: what its header says, checked before anything is loaded, and loading by transformers.

The header is read here, within the bounds of the file and without the lists in it (a vocabulary takes the `gguf`
package seconds). transformers widens the weights to plain numbers. It leaves the scaling of rotary embeddings out,
which is read here too, or the file refused.
"""

import contextlib
import math
import mmap
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from turboquant.models.checks import MOST_LAYERS, first_line
from turboquant.models.registry import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SUFFIX = ".gguf"
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
MOST_DIMENSIONS = 8
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct` by the number of a value's type (the GGUF specification of ggml)."""
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        kind: Name of its type, such as F32 or Q4_1.
        count: How many numbers it has.
        start: First byte in the file.
        size: Bytes.
    """

    kind: str
    count: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What stands before the weights.

    Attributes:
        path: The file.
        fields: Its values, but for lists.
        tensors: By name.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        """As llama.cpp names it."""
        return str(self.fields.get("general.architecture"))

    @cached_property
    def kind(self) -> str:
        """The type that most of the weights have."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.kind] += tensor.count
        return counts.most_common(1)[0][0]

    def array(self, name: str) -> torch.Tensor:
        """Return a float32 tensor of the file."""
        entry = self.tensors[name]
        data = np.fromfile(self.path, "<f4", entry.count, offset=entry.start)
        return torch.from_numpy(data.copy())


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == SUFFIX


def read_header(path: Path) -> Header:
    """Read and check what stands before the weights of a GGUF file.

    Raises:
        ModelError: If it is no GGUF file, cut short, damaged, one of several parts, or of a type that nothing reads.
        OSError: If it cannot be read.
    """
    if split := re.search(r"-(\d{5})-of-(\d{5})$", path.stem):
        raise ModelError(_parts(path, int(split[2])))
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{path.name} is no GGUF file: it does not begin with the letters GGUF.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _read(path, _Reader(data, size))
            except (struct.error, ValueError, OverflowError) as error:
                raise ModelError(
                    f"{path.name} is cut short or damaged: its header ends nowhere in its {size:,} bytes; "
                    "fetch the file again."
                ) from error
    if (parts := int(header.fields.get("split.count") or 1)) > 1:
        raise ModelError(_parts(path, parts))
    if not header.tensors:
        raise ModelError(f"{path.name} holds no weights, only a vocabulary: choose a file with a model.")
    end = max(tensor.start + tensor.size for tensor in header.tensors.values())
    if end > size:
        raise ModelError(f"{path.name} is cut short: {size:,} of {end:,} bytes are there; fetch the file again.")
    return header


def options(path: Path) -> dict[str, Any]:
    """Return what transformers' loaders are to be called with for a folder, or for a GGUF file in its folder."""
    if not is_gguf(path):
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


@contextlib.contextmanager
def alone(path: Path) -> Iterator[Path]:
    """Give a path of a GGUF file in a folder of its own: transformers reads other files beside it too."""
    if not is_gguf(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="turboquant-") as folder:
        link = Path(folder) / f"model{SUFFIX}"
        link.symlink_to(path.resolve())
        yield link


def read_config(header: Header) -> "PreTrainedConfig":
    """Return the configuration in a header, the scaling of its rotary embeddings included.

    Raises:
        ModelError: If transformers does not know the architecture in this format, or not its scaling.
    """
    from transformers import AutoConfig

    for name in ("block_count", "expert_count"):
        if (count := header.fields.get(f"{header.architecture}.{name}") or 0) > MOST_LAYERS:
            raise ModelError(f"{header.path.name} has a {name} of {count}; at most {MOST_LAYERS} is read.")
    try:
        with alone(header.path) as path:
            config = AutoConfig.from_pretrained(**options(path))
    except MemoryError:
        raise
    except Exception as error:  # whatever its class makes of values that nobody has checked
        if "not supported" in str(error):
            why = f"is of the architecture {header.architecture}, which transformers does not read from GGUF files"
        else:
            why = f"has a header that transformers makes no configuration of ({first_line(error)[:80]})"
        raise ModelError(f"{header.path.name} {why}: choose another file or the original repository.") from error
    config._name_or_path = str(header.path)
    _scale(config, header)
    return config


def read_model(kind: Any, header: Header, config: "PreTrainedConfig", **how: Any) -> "tuple[PreTrainedModel, Any]":
    """Return a model with the weights of a GGUF file as plain numbers, and what its class says of loading them.

    Args:
        kind: Class of transformers that makes it.
        header: Of the file.
        config: As `read_config` gives it.
        **how: Goes to `from_pretrained`.

    Raises:
        ModelError: If the file has weights that transformers has left out.
    """
    import transformers

    # A GGUF file can stay packed only in newer versions, and there only where kernels are fetched from the hub.
    if (plain := getattr(transformers, "GgufConfig", None)) is not None:
        how["quantization_config"] = plain(dequantize=True)
    with alone(header.path) as path, _no_bar():
        model, info = kind.from_pretrained(**options(path), config=config, output_loading_info=True, **how)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config._name_or_path = str(header.path)
    _check_biases(model, header)
    if ROPE_FACTORS in header.tensors:
        _divide_frequencies(model, header.array(ROPE_FACTORS))
    return model, info


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Keep transformers' bar over the tensors from standard error; nothing else turns it off in a running process."""
    from transformers import modeling_gguf_pytorch_utils as utils

    bar: Any = getattr(utils, "tqdm", None)
    utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        utils.tqdm = bar


class _Reader:
    """Reads values one after the other; raises `struct.error` at the end of the data."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.place = data, size, 0

    def skip(self, count: int) -> None:
        self.place += count
        if self.place > self.size:
            raise struct.error

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.skip(struct.calcsize(form))
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.skip(length)
        return self.data[self.place - length : self.place].decode(errors="replace")

    def value(self) -> Any:
        """Read a value with its type; of lists nothing is kept."""
        kind = self.number("I")
        if kind == ARRAY:
            self.array()
            return None
        return self.text() if kind == STRING else self.number(_scalar(kind))

    def array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind != STRING:
            self.skip(count * struct.calcsize(_scalar(kind)))
            return
        for _ in range(count):  # each takes eight bytes at least, so the file's end stops it
            self.skip(self.number("Q"))


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(kind)
    return SCALARS[kind]


def _read(path: Path, data: _Reader) -> Header:
    data.skip(4)
    if (version := data.number("I")) not in VERSIONS:
        raise ModelError(
            f"{path.name} is of GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read."
        )
    tensors, values = data.number("Q"), data.number("Q")
    fields = {}
    for _ in range(values):
        name = data.text()
        fields[name] = data.value()
    entries = [_entry(data) for _ in range(tensors)]
    alignment = int(fields.get("general.alignment") or ALIGNMENT)
    start = -(-data.place // alignment) * alignment
    placed = {name: _tensor(path, start + offset, shape, kind) for name, shape, kind, offset in entries}
    return Header(path, fields, placed)


def _entry(data: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = data.text(), data.number("I")
    if dimensions > MOST_DIMENSIONS:
        raise ValueError(dimensions)
    return name, tuple(data.number("Q") for _ in range(dimensions)), data.number("I"), data.number("Q")


def _tensor(path: Path, start: int, shape: tuple[int, ...], number: int) -> TensorEntry:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(kind): kind for kind in GGMLQuantizationType}
    if number not in known or not _is_readable(known[number]):
        name = known[number].name if number in known else f"number {number}"
        raise ModelError(
            f"{path.name} has weights of the type {name}, which the package gguf does not read: choose another file."
        )
    block, size = GGML_QUANT_SIZES[known[number]]
    count = math.prod(shape)
    return TensorEntry(known[number].name, count, start, count // block * size)


def _is_readable(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _parts(path: Path, count: int) -> str:
    return (
        f"{path.name} is one of {count} parts of a model: join them with llama.cpp's `llama-gguf-split --merge`, "
        "then give the path of the whole."
    )


def _scale(config: "PreTrainedConfig", header: Header) -> None:
    """Put a scaling of the rotary embeddings into the configuration, where transformers has not."""
    prefix = f"{header.architecture}.rope.scaling."
    kind = header.fields.get(prefix + "type")
    factors = [name for name in header.tensors if name.startswith("rope_") and name != ROPE_FACTORS]
    every = getattr(config, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)
    if not factors and (kind in (None, "none") or rope.get("rope_type", "default") != "default"):
        return
    if factors or kind not in ("linear", "yarn"):
        raise ModelError(
            f"{header.path.name} scales its rotary embeddings ({factors[0] if factors else kind}), which transformers "
            "does not read from GGUF files: choose the original repository."
        )
    rope |= {"rope_type": kind, "factor": float(header.fields.get(prefix + "factor") or 1.0)}
    if kind == "yarn" and (length := header.fields.get(prefix + "original_context_length")):
        rope["original_max_position_embeddings"] = int(length)


def _check_biases(model: "PreTrainedModel", header: Header) -> None:
    """Refuse biases that the configuration of transformers has no place for: they are left out without a word."""
    there = sum(tensor.count for name, tensor in header.tensors.items() if name.endswith("bias"))
    read = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.endswith("bias"))
    if there > read:
        raise ModelError(
            f"{header.path.name} has biases, of which transformers reads {read:,} of {there:,} values: "
            "choose the original repository."
        )


def _divide_frequencies(model: "PreTrainedModel", factors: torch.Tensor) -> None:
    """Scale rotary embeddings as Llama 3.1 does: llama.cpp divides each frequency by a factor of the file."""
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(frequencies := getattr(module, name, None), torch.Tensor):
                frequencies.div_(factors.to(frequencies))
