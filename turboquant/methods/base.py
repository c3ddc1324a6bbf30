"""What a method is, and the text that names it."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch

from turboquant.quant.codebook import check_bits
from turboquant.quant.quantizer import Quantizer

METHODS: dict[str, type["Method"]] = {}
SHOWN_CHARS = 40
"""Characters of a wrong value that an error repeats."""


def check_length(value: object, name: str) -> None:
    """Raise ValueError unless `value` is a whole number of tokens, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of tokens, 0 or more, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        shown = value[:SHOWN_CHARS] if isinstance(value, str) else value
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {shown!r}")


class NoSuchLayerError(ValueError):
    """A method names a layer that the model does not have, or whose cache is not compressed."""


@dataclass(frozen=True)
class Method(ABC):
    """How a cache stores keys and values. Subclasses set `name` and register themselves by it.

    Attributes:
        residual_length: The most recent tokens that stay exact.
        sink_length: The first tokens of a row that stay exact (pad tokens do not count).
        seed: Seed of the random rotations.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    color: ClassVar[str] = "#7a8494"
    """In every figure. Colour-blind readers tell those of the methods here apart (after Okabe and Ito, and Tol)."""
    sign: ClassVar[str] = "star"
    """Marker in every figure, as plotly names it."""
    presets: ClassVar[tuple[str, ...]] = ()
    """Settings that are offered to choose from, without the name: `bits=4`; "" for the defaults."""
    grid: ClassVar[tuple[str, ...]] = ()
    """Settings that `turboquant methods` measures."""
    compresses: ClassVar[bool] = True
    """Is anything ever packed? Not by `full`."""
    foreign: ClassVar[bool] = False
    """Do the layers belong to another library? Then there are no quantizers."""
    residual_length = 0  # not annotated, so not an option: methods that have a window declare the field
    sink_length = 0
    block_length: ClassVar[int] = 32
    """Tokens leave the exact window in blocks of this size, so the window may be up to one block longer."""
    rounds_exact: ClassVar[bool] = True
    """May exact tokens of float32 models be kept in 16 bits?"""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        if cls.name in METHODS:
            raise TypeError(f"two methods are named {cls.name!r}")
        METHODS[cls.name] = cls

    @abstractmethod
    def quantizers(
        self, key_dim: int, value_dim: int, layer_idx: int, device: torch.device
    ) -> tuple[Quantizer[Any], Quantizer[Any]] | None:
        """Return the key and the value quantizer of one layer.

        None where the method stores plain tensors, or where its layers quantize by themselves.
        """

    def layer(self, plain: Any, layer_idx: int, last_reader: int | None = None, config: Any = None) -> Any:
        """Return a new cache layer that takes the place of a plain one.

        Args:
            plain: Hugging Face's own layer, which keeps the keys and values of all tokens.
            layer_idx: Its index in the model.
            last_reader: See `turboquant.cache.layer.QuantizedLayer`.
            config: The model's.

        Raises:
            ImportError: As `check_available`.
        """
        from turboquant.cache.kinds import packed_layer  # brings transformers along

        return packed_layer(self, plain, layer_idx, last_reader, config)

    def check_available(self) -> None:  # noqa: B027
        """Raise ImportError where a package that the method needs is missing here."""

    def packed_length(self, tokens: int) -> int:
        """Return how many of `tokens` tokens are packed once they have been processed (rows without padding)."""
        ready = tokens - self.sink_length - self.residual_length
        return max(0, ready // self.block_length * self.block_length)

    def packs(self, tokens: int) -> bool:
        """Return whether a cache of `tokens` tokens holds any that are packed (rows without padding)."""
        return self.packed_length(tokens) > 0

    @property
    def has_quantizers(self) -> bool:
        """Whether `quantizers` say how tokens are packed; without them there are no head figures and no estimates."""
        return self.compresses and not self.foreign

    def layer_kind(self, layer_idx: int) -> object:
        """Return what tells layers apart that are packed differently: equal for layers of equal bits."""
        del layer_idx
        return None

    def check_layers(self, count: int, compressed: Collection[int]) -> None:
        """Raise NoSuchLayerError if the method names a layer that a model does not have, or that is not compressed.

        Args:
            count: The model's layers.
            compressed: Those of them that keep the keys and values of all tokens.
        """
        del count, compressed

    @property
    def payload_bits(self) -> float | None:
        """Mean bits a value that the methodology's formula counts: codes and signs, without norms; None if n/a."""
        return None

    def __str__(self) -> str:
        """Return the string that `parse_method` reads: the name, then every field that differs from its default."""
        changed = [f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if self._is_printed(f.name)]
        return ":".join([self.name, ",".join(changed)]) if changed else self.name

    def _is_printed(self, field_name: str) -> bool:
        default = {f.name: f.default for f in fields(self)}[field_name]
        return getattr(self, field_name) != default


@dataclass(frozen=True)
class BitsMethod(Method, ABC):
    """A method with separate key and value bits; `bits` sets both and is None where they differ."""

    default_bits: ClassVar[int] = 4
    bits: int | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    residual_length: int = 0
    sink_length: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Resolve the shorthand and check every number."""
        both = self.default_bits if self.bits is None else check_bits(self.bits)
        key_bits = both if self.key_bits is None else check_bits(self.key_bits, "key_bits")
        value_bits = both if self.value_bits is None else check_bits(self.value_bits, "value_bits")
        object.__setattr__(self, "key_bits", key_bits)
        object.__setattr__(self, "value_bits", value_bits)
        object.__setattr__(self, "bits", key_bits if key_bits == value_bits else None)
        check_length(self.residual_length, "residual_length")
        check_length(self.sink_length, "sink_length")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be a whole number from 0 to {2**31 - 1}, got {self.seed!r}")

    @property
    def resolved_bits(self) -> tuple[int, int]:
        """Key bits and value bits."""
        assert self.key_bits is not None
        assert self.value_bits is not None
        return self.key_bits, self.value_bits

    @property
    def payload_bits(self) -> float | None:
        """Mean of key and value bits."""
        return sum(self.resolved_bits) / 2

    def _is_printed(self, field_name: str) -> bool:
        if field_name == "bits":
            return self.bits is not None
        if field_name in ("key_bits", "value_bits"):
            return self.bits is None
        return super()._is_printed(field_name)


def in_order(names: Iterable[str]) -> list[str]:
    """Return methods as lists show them: TurboQuant first, other libraries' caches last."""
    return sorted(names, key=lambda name: (METHODS[name].foreign, not name.startswith("turboquant"), name))


def settings_of(attribute: Literal["presets", "grid"]) -> list[str]:
    """Return the `presets` or the `grid` of all methods, as `parse_method` reads them."""
    each = ((name, options) for name in in_order(METHODS) for options in getattr(METHODS[name], attribute))
    return [f"{name}:{options}" if options else name for name, options in each]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(kind: str, name: str, known: list[str]) -> ValueError:
    name = name[:SHOWN_CHARS]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}choose from {', '.join(known)}")


def _value(method_name: str, key: str, text: str, default: object) -> object:
    """Read one value, by the type of the field's default (None means a whole number)."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{method_name}: {key} must be true or false, got {text[:SHOWN_CHARS]!r}")
        return text == "true"
    if default is None or isinstance(default, int):
        if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 19:
            raise ValueError(f"{method_name}: {key} must be a whole number, got {text[:SHOWN_CHARS]!r}")
        return int(text)
    return text


def parse_method(spec: str) -> Method:
    """Read a method from its string, ``name`` or ``name:key=value,key=value``; inverse of ``str(method)``.

    Raises:
        ValueError: If the name, a key or a value is not known, names its rule and the value given.

    Example:
        >>> str(parse_method("turboquant:key_bits=4,value_bits=4"))
        'turboquant:bits=4'
    """
    name, _, rest = spec.strip().partition(":")
    if name not in METHODS:
        raise _unknown("method", name, sorted(METHODS))
    cls = METHODS[name]
    defaults = {f.name: f.default for f in fields(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, text = (piece.strip() for piece in item.partition("="))
        if not equals:
            raise ValueError(f"{name}: options are written key=value, got {item[:SHOWN_CHARS]!r}")
        if key not in defaults:
            raise (
                _unknown(f"option of {name}", key, list(defaults))
                if defaults
                else ValueError(f"{name} has no options, got {item[:SHOWN_CHARS]!r}")
            )
        if key in values:
            raise ValueError(f"{name}: {key} is given twice")
        values[key] = _value(name, key, text, defaults[key])
    return cls(**values)
