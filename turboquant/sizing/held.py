"""Bytes of a KV cache, part by part as `cache_report` measures them, from a shape and a method.

What a vector costs is not written down here: the method's own quantizers pack one group of zeros and the result is
weighed. So the figures follow a method when its layout changes.

Spare room is counted as `cache.layer` keeps it after a context that was read in one call: none behind the codes,
and an exact window as large as it ever gets between two packings (sinks, residual window and one block; a context
shorter than that is plain tensors, and may hold less room than counted). A cache that grows token by token keeps up to
a sixteenth more behind its codes; `growing` counts that.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from turboquant.records.base import Record
from turboquant.sizing.config import KVShape

if TYPE_CHECKING:
    from turboquant.methods import Method
    from turboquant.quant.quantizer import PackedTensor, Quantizer

MOST_TOKENS = 2**40
"""What `longest_context` returns where no context is too long: every layer keeps a window only."""
MOST_ROWS = 2**24
RESERVE_BYTES = 2**30
"""For activations and the CUDA context, which are not estimated."""


class SizingError(ValueError):
    """A cache cannot be estimated; the message is one sentence that says why."""


class KVBytes(Record):
    """What a cache is estimated to hold; the fields are those of `CacheReport`, all in bytes.

    `full_precision_bytes` is the 16-bit baseline: 2 bytes for every value of every token that a layer keeps.
    """

    tokens: int
    batch: int
    compressed_tokens: int
    key_bytes: int
    value_bytes: int
    scale_bytes: int
    exact_bytes: int
    spare_bytes: int
    shared_bytes: int
    full_precision_bytes: int
    state_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Everything held."""
        codes = self.key_bytes + self.value_bytes + self.scale_bytes
        return codes + self.exact_bytes + self.spare_bytes + self.shared_bytes

    @property
    def bits_per_value(self) -> float:
        """Everything held, in bits, divided by the number of cached values; 0 for an empty cache."""
        return 16 * self.bytes / self.full_precision_bytes if self.full_precision_bytes else 0.0

    @property
    def compression_ratio(self) -> float:
        """The 16-bit baseline divided by everything held; 1 for an empty cache."""
        return self.full_precision_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class _Packed:
    """What keys or values of one head take, in bytes: `group` tokens, and once for all tokens (a mean)."""

    group: int
    codes: int
    scales: int
    once: int


@dataclass(frozen=True)
class _Layout:
    """How the full layers of a model are packed: number of layers, keys, values; and the tables they all share."""

    layers: tuple[tuple[int, _Packed, _Packed], ...]
    table_bytes: int


def _weigh(quantizer: "Quantizer[Any]", dim: int) -> _Packed:
    import torch

    group = quantizer.token_group
    packed: PackedTensor = quantizer.quantize(torch.zeros(1, 1, group, dim, dtype=torch.float32, device="cpu"))
    codes = sum(tensor.nbytes for tensor in packed.tensors(*packed.code_fields))
    once = sum(tensor.nbytes for name in sorted(packed.shared) for tensor in packed.tensors(name))
    return _Packed(group, codes, packed.nbytes - codes - once, once)


def _tables(quantizers: "tuple[Quantizer[Any], Quantizer[Any]]") -> dict[int, int]:
    """Bytes of the storages of both quantizers' tables, by address."""
    storages = [table.untyped_storage() for quantizer in quantizers for table in quantizer.tables()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@lru_cache(maxsize=128)
def _layout(method: "Method", key_dim: int, value_dim: int, places: tuple[int, ...]) -> _Layout:
    """Pack zeros in the first layer of each kind the method makes; a second layer tells which tables are shared."""
    import torch

    kinds: dict[object, list[int]] = {}
    for place in places:
        kinds.setdefault(method.layer_kind(place), []).append(place)
    layers, shared, own, kept = [], dict[int, int](), 0, []
    for part in kinds.values():
        pairs = [method.quantizers(key_dim, value_dim, i, torch.device("cpu")) for i in part[:2]]
        kept.append(pairs)  # a freed table's address may be given to the next
        first = pairs[0]
        assert first is not None
        layers.append((len(part), _weigh(first[0], key_dim), _weigh(first[1], value_dim)))
        tables = [_tables(pair) for pair in pairs if pair is not None]
        common = {address: size for address, size in tables[0].items() if address in tables[-1]}
        shared |= common
        own += len(part) * (sum(tables[0].values()) - sum(common.values()))
    return _Layout(tuple(layers), sum(shared.values()) + own)


def kv_bytes(
    shape: KVShape, method: "Method", tokens: int, batch: int = 1, *, value_bytes: int = 2, growing: bool = False
) -> KVBytes:
    """Estimate what a cache holds, part by part.

    Args:
        shape: From `read_config`.
        method: From `parse_method`; not one of those whose layers belong to Hugging Face.
        tokens: Tokens in each row.
        batch: Rows, none of them padded.
        value_bytes: Bytes of a value that stays exact: 2 for 16 bits, 4 where the model runs in float32.
        growing: Count the most room that a cache keeps behind its codes when it grew token by token.

    Raises:
        SizingError: The method cannot be estimated for that shape, or a number is out of range.

    Example:
        >>> from turboquant import parse_method
        >>> from turboquant.sizing import read_config
        >>> fields = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        >>> shape = read_config({"model_type": "llama", **fields})
        >>> kv_bytes(shape, parse_method("full"), tokens=8192).bytes / 2**30
        1.0
    """
    for name, number, most in (("tokens", tokens, MOST_TOKENS), ("batch", batch, MOST_ROWS)):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
            raise SizingError(f"{name} must be a whole number from 0 to {most:,}, got {number!r}")
    check_method(shape, method)
    rows = batch * shape.kv_heads
    cost = value_bytes * rows * (shape.key_dim + shape.value_dim)
    held = {name: 0 for name in ("key", "value", "scale", "shared")}
    exact, spare, packed_tokens = tokens, 0, 0
    if method.compresses and shape.full_layers and tokens and batch:
        packed_tokens = method.packed_length(tokens)
        exact = tokens - packed_tokens
        places = tuple(i for i, kind in enumerate(shape.layers) if kind == "full")
        try:
            method.check_layers(len(shape.layers), places)
            layout = _layout(method, shape.key_dim, shape.value_dim, places)
        except ValueError as error:  # the method's own rule about dims
            raise SizingError(f"{method.name} cannot hold this model's cache: {error}.") from None
        held, spare = _packed_bytes(layout, method, packed_tokens, rows, growing)
        room = method.sink_length + method.residual_length + method.block_length
        spare += shape.full_layers * cost * (room - exact)
    window = shape.window or 0
    seen, kept = min(tokens, window), min(tokens, max(window - 1, 0))  # a layer keeps one token less than it sees
    return KVBytes(
        tokens=tokens,
        batch=batch,
        compressed_tokens=packed_tokens,
        key_bytes=held["key"],
        value_bytes=held["value"],
        scale_bytes=held["scale"],
        exact_bytes=cost * (shape.full_layers * exact + shape.sliding_layers * kept),
        spare_bytes=spare + cost * shape.sliding_layers * (seen - kept),
        shared_bytes=held["shared"],
        full_precision_bytes=2
        * batch
        * shape.token_values
        * (shape.full_layers * tokens + shape.sliding_layers * kept),
    )


def check_method(shape: KVShape, method: "Method") -> None:
    """Refuse a method that cannot be estimated for a shape.

    Raises:
        SizingError: Says why.
    """
    if not method.compresses:
        return
    if shape.latent:
        raise SizingError(
            "This model caches one joint latent a token (MLA) in place of keys and values; the methods here compress "
            "keys and values head by head, so there is no compressed figure."
        )
    if not method.has_quantizers:
        raise SizingError(
            f"{method.name} belongs to Hugging Face's cache, which packs at moments that depend on how the tokens "
            "came; measure it with cache_report instead."
        )


def _packed_bytes(
    layout: _Layout, method: "Method", tokens: int, rows: int, growing: bool
) -> tuple[dict[str, int], int]:
    """Return bytes of codes, scales and tables of all full layers, and of the room behind the codes."""
    held = {"key": 0, "value": 0, "scale": 0, "shared": layout.table_bytes}
    spare = 0
    for count, *pair in layout.layers:
        group = max(packed.group for packed in pair)
        more = max(method.block_length, tokens // 16) if growing and tokens else 0
        more = -(-more // group) * group
        for name, packed in zip(("key", "value"), pair, strict=True):
            groups = tokens // packed.group
            held[name] += count * rows * groups * packed.codes
            held["scale"] += count * rows * (groups * packed.scales + (packed.once if tokens else 0))
            spare += count * rows * (more // packed.group) * (packed.codes + packed.scales)
    return held, spare


def weight_bytes(parameters: int, bits: int) -> int:
    """Return the bytes of the weights at so many bits each; scales of quantized weights are not counted."""
    return -(-parameters * bits // 8)


def _most(held: Callable[[int], int], room: int, limit: int) -> int:
    """Return the greatest number, at most `limit`, for which `held` (which never falls) does not exceed `room`."""
    return bisect_right(range(1, limit + 1), room, key=held) if room >= 0 else 0


def longest_context(
    shape: KVShape,
    method: "Method",
    gpu_bytes: int,
    weight_bytes: int,
    batch: int = 1,
    *,
    reserve_bytes: int = RESERVE_BYTES,
    **options: Any,
) -> int:
    """Return the most tokens a row whose cache fits beside the weights, found by bisection on `kv_bytes`.

    0 where the weights and the reserve alone do not fit, `MOST_TOKENS` where nothing limits it. It may be more than
    the model has positions for.

    Args:
        shape: From `read_config`.
        method: From `parse_method`.
        gpu_bytes: Memory of the GPU.
        weight_bytes: Taken by the weights.
        batch: Rows of that length.
        reserve_bytes: Left free for activations and the CUDA context.
        options: `value_bytes` and `growing` of `kv_bytes`.

    Raises:
        SizingError: As in `kv_bytes`.
    """
    kv_bytes(shape, method, 1, batch)  # what cannot be estimated is refused even where nothing fits
    room = gpu_bytes - weight_bytes - reserve_bytes
    return _most(lambda tokens: kv_bytes(shape, method, tokens, batch, **options).bytes, room, MOST_TOKENS)


def largest_batch(
    shape: KVShape,
    method: "Method",
    gpu_bytes: int,
    weight_bytes: int,
    tokens: int,
    *,
    reserve_bytes: int = RESERVE_BYTES,
    **options: Any,
) -> int:
    """Return the most rows of `tokens` tokens whose cache fits beside the weights; see `longest_context`.

    0 where not even one fits, `MOST_ROWS` where nothing limits it (no tokens).
    """
    kv_bytes(shape, method, tokens, 1)
    room = gpu_bytes - weight_bytes - reserve_bytes
    return _most(lambda rows: kv_bytes(shape, method, tokens, rows, **options).bytes, room, MOST_ROWS)
