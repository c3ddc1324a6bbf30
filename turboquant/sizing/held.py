"""Bytes of a KV cache, part by part as `cache_report` measures them, from a shape and a method.

What a vector costs is not written down here: the method's own quantizers pack one group of zeros and the result is
weighed. So the figures follow a method when its layout changes.

Exact tokens of packed layers take 16 bits, in float32 models too. A context that was read in one call leaves no spare
room. A cache that grows token by token keeps up to a sixteenth more behind its codes, and held up to a block more
exact tokens before it last packed; `growing` counts both.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from turboquant.records.base import Record
from turboquant.sizing.shape import KVShape, LayerShape

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

    `state_bytes` are those of recurrent layers. `full_precision_bytes` is the 16-bit baseline: 2 bytes for every value
    of every token that a layer keeps, and the recurrent states.
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
    state_bytes: int
    full_precision_bytes: int

    @property
    def bytes(self) -> int:
        """Everything held."""
        codes = self.key_bytes + self.value_bytes + self.scale_bytes
        return codes + self.exact_bytes + self.spare_bytes + self.shared_bytes + self.state_bytes

    @property
    def bits_per_value(self) -> float:
        """Everything held but recurrent states, in bits, divided by the number of cached values; 0 without any."""
        values = self.full_precision_bytes - self.state_bytes
        return 16 * (self.bytes - self.state_bytes) / values if values else 0.0

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
class _Group:
    """Layers that are packed alike: their number, KV heads, keys and values."""

    count: int
    kv_heads: int
    keys: _Packed
    values: _Packed


@dataclass(frozen=True)
class _Layout:
    """How the layers of a model are packed, and the bytes of all their tables."""

    groups: tuple[_Group, ...]
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
def _layout(method: "Method", layers: tuple[LayerShape, ...]) -> _Layout:
    """Pack zeros in the first layer of each kind the method makes; a second layer tells which tables are shared."""
    import torch

    places = [i for i, layer in enumerate(layers) if layer.packed]
    method.check_layers(len(layers), places)
    alike: dict[tuple[object, LayerShape], list[int]] = {}
    for place in places:
        alike.setdefault((method.layer_kind(place), layers[place]), []).append(place)
    groups, shared, own, kept = [], dict[int, int](), 0, []
    for (_, layer), part in alike.items():
        pairs = [method.quantizers(layer.key_dim, layer.value_dim, i, torch.device("cpu")) for i in part[:2]]
        kept.append(pairs)  # a freed table's address may be given to the next
        first = pairs[0]
        assert first is not None
        keys, values = _weigh(first[0], layer.key_dim), _weigh(first[1], layer.value_dim)
        groups.append(_Group(len(part), layer.kv_heads, keys, values))
        tables = [_tables(pair) for pair in pairs if pair is not None]
        common = {address: size for address, size in tables[0].items() if address in tables[-1]}
        shared |= common
        own += len(part) * (sum(tables[0].values()) - sum(common.values()))
    return _Layout(tuple(groups), sum(shared.values()) + own)


def kv_bytes(
    shape: KVShape, method: "Method", tokens: int, batch: int = 1, *, value_bytes: int = 2, growing: bool = False
) -> KVBytes:
    """Estimate what a cache holds, part by part.

    Args:
        shape: From `read_config`.
        method: From `parse_method`; not one of those whose layers belong to Hugging Face.
        tokens: Tokens in each row.
        batch: Rows, none of them padded.
        value_bytes: Bytes of a value of the model: 2 for 16 bits, 4 in float32, of which packed layers keep 2.
        growing: Count the most that a cache held when it grew token by token.

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
    check_method(method)
    held = dict.fromkeys(("key", "value", "scale", "spare", "shared"), 0)
    packed_tokens = longer = 0
    if method.compresses and shape.packed_layers and tokens and batch:
        packed_tokens = method.packed_length(tokens)
        try:
            layout = _layout(method, shape.layers)
        except ValueError as error:  # the method's own rule about dims
            raise SizingError(f"{method.name} cannot hold this model's cache: {error}.") from None
        held = _packed_bytes(layout, packed_tokens, batch, growing)
        if packed_tokens and growing:
            window = method.sink_length + method.residual_length + method.block_length
            longer = window - (tokens - packed_tokens)
    values = exact = spare = 0
    for layer, count in Counter(shape.layers).items():
        kept, packs = layer.tokens_kept(tokens), layer.packed and method.compresses
        token_bytes = batch * count * layer.token_values * (min(2, value_bytes) if packs else value_bytes)
        values += count * layer.token_values * kept
        exact += token_bytes * (kept - packed_tokens * layer.packed)
        spare += token_bytes * (longer if layer.packed else min(tokens, layer.window or tokens) - kept)
    state = sum(layer.state_values * value_bytes + layer.state_bytes for layer in shape.layers) if tokens else 0
    return KVBytes(
        tokens=tokens,
        batch=batch,
        compressed_tokens=packed_tokens,
        key_bytes=held["key"],
        value_bytes=held["value"],
        scale_bytes=held["scale"],
        exact_bytes=exact,
        spare_bytes=spare + held["spare"],
        shared_bytes=held["shared"],
        state_bytes=batch * state,
        full_precision_bytes=batch * (2 * values + state),
    )


def check_method(method: "Method") -> None:
    """Refuse a method whose layers cannot be estimated.

    Raises:
        SizingError: Says why.
    """
    if method.compresses and not method.has_quantizers:
        raise SizingError(
            f"{method.name} belongs to Hugging Face's cache, which packs at moments that depend on how the tokens "
            "came; measure it with cache_report instead."
        )


def _packed_bytes(layout: _Layout, tokens: int, batch: int, growing: bool) -> dict[str, int]:
    """Return bytes of codes, scales and tables of all packed layers, and of the room behind the codes."""
    held = {"key": 0, "value": 0, "scale": 0, "spare": 0, "shared": layout.table_bytes}
    for group in layout.groups:
        rows, pair = group.count * batch * group.kv_heads, (group.keys, group.values)
        for name, packed in zip(("key", "value"), pair, strict=True):
            parts = tokens // packed.group
            held[name] += rows * parts * packed.codes
            held["scale"] += rows * (parts * packed.scales + (packed.once if tokens else 0))
            held["spare"] += rows * (growing * tokens // 16 // packed.group) * (packed.codes + packed.scales)
    return held


def weight_bytes(parameters: int, bits: int) -> int:
    """Return the bytes of the weights at so many bits each; scales of quantized weights are not counted."""
    return -(-parameters * bits // 8)


def _most(held: Callable[[int], int], room: int, numbers: range) -> int:
    """Return the greatest of the numbers for which `held` (which never falls) does not exceed `room`, or 0."""
    count = bisect_right(numbers, room, key=held) if room >= 0 else 0
    return numbers[count - 1] if count else 0


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
    """Return the most tokens a row, read in one call, whose cache fits beside the weights, found by bisection.

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

    def held(tokens: int) -> int:
        return kv_bytes(shape, method, tokens, batch, **options).bytes

    # Bytes fall where a block is packed, and rise from one such place to the next.
    block = method.block_length
    first = method.sink_length + method.residual_length + block
    packed = _most(held, room, range(first, MOST_TOKENS + 1, block))
    end = packed + block if packed else first
    return max(packed, _most(held, room, range(packed + 1, min(end, MOST_TOKENS + 1))))


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
    return _most(lambda rows: kv_bytes(shape, method, tokens, rows, **options).bytes, room, range(1, MOST_ROWS + 1))
