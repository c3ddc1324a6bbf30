"""Bits of single layers, as methods write them: ``0+4-6:2+9:5/3``.

Layers 0 and 4 to 6 have 2 bits, layer 9 has 5 bits a key and 3 bits a value; all others have the method's own. Items
stand between plus signs, a layer or a range each, and those without bits take those of the next item that has some.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby

from turboquant.quant.codebook import check_bits

Bits = tuple[int, int]
"""Of keys and of values."""
_ITEM = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?(?::(\d)(?:/(\d))?)?", re.ASCII)


@lru_cache(maxsize=256)
def read_layer_bits(text: str) -> Mapping[int, Bits]:
    """Return the bits of each layer that is named.

    Raises:
        ValueError: If the text is not of that form, a number of bits is not 1 to 8, or a layer is named twice.

    Example:
        >>> read_layer_bits("0+2-3:2+5:4/3")
        {0: (2, 2), 2: (2, 2), 3: (2, 2), 5: (4, 3)}
    """
    found: dict[int, Bits] = {}
    waiting: list[int] = []
    for item in text.split("+") if text else ():
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"layers are written like 0+4-6:2+9:5/3 (layers, then bits), got {item[:40]!r}")
        first, last, key_bits, value_bits = match.groups()
        if last and int(last) < int(first):
            raise ValueError(f"a range of layers runs upwards, got {item[:40]!r}")
        waiting += range(int(first), int(last or first) + 1)
        if key_bits is None:
            continue
        keys = check_bits(int(key_bits), "bits of a layer")
        values = check_bits(int(value_bits), "bits of a layer") if value_bits else keys
        for layer in waiting:
            if layer in found:
                raise ValueError(f"layer {layer} is given bits twice")
            found[layer] = keys, values
        waiting = []
    if waiting:
        raise ValueError(f"layer {waiting[-1]} is given no bits: write them behind it, like {waiting[-1]}:2")
    return found


def write_layer_bits(bits: Mapping[int, Bits]) -> str:
    """Return the one text that names these layers and bits; inverse of `read_layer_bits`.

    Example:
        >>> write_layer_bits({5: (4, 3), 3: (2, 2), 2: (2, 2), 0: (2, 2)})
        '0+2-3:2+5:4/3'
    """
    layers: dict[Bits, list[int]] = {}
    for layer in sorted(bits):
        layers.setdefault(bits[layer], []).append(layer)
    return "+".join(f"{'+'.join(_ranges(named))}:{_text(pair)}" for pair, named in layers.items())


def _text(pair: Bits) -> str:
    keys, values = pair
    return f"{keys}" if keys == values else f"{keys}/{values}"


def _ranges(layers: list[int]) -> list[str]:
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
