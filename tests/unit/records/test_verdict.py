"""Sizes in words: a compressed cache beside a 16-bit one."""

import pytest

from tests.support.models import tiny_loaded, tokens
from tests.support.sample_records import cache
from turboquant import build_cache, cache_report, parse_method
from turboquant.records.comparison import CacheReport
from turboquant.records.verdict import against_16_bits, cache_size

MIB = 2**20


def report(held: int, full: int, packed: int, tokens: int = 163) -> CacheReport:
    changes = {"bytes": held, "full_precision_bytes": full, "compressed_tokens": packed, "tokens": tokens}
    return cache(4.0).model_copy(update=changes)


@pytest.mark.parametrize(
    ("held", "packed", "words"),
    [
        (10 * MIB, 160, "1.90 times smaller than a 16-bit cache, everything counted"),
        (19 * MIB, 160, "as large as a 16-bit cache, everything counted"),
        (19 * MIB + 40_000, 64, "as large as a 16-bit cache, everything counted"),
        (18 * MIB, 64, "1.06 times smaller than a 16-bit cache, everything counted"),
        (21 * MIB + MIB // 2, 64, "larger by 2.50 MiB than a 16-bit cache: only 64 of 163 tokens are packed"),
        (
            20 * MIB,
            100,
            "larger by 1.00 MiB than a 16-bit cache: spare room, tables and exact tokens outweigh what packing saves",
        ),
    ],
)
def test_a_cache_is_smaller_or_larger_and_never_less_than_once_as_small(held: int, packed: int, words: str) -> None:
    assert cache_size(report(held, 19 * MIB, packed)) == words


def test_sizes_without_a_report() -> None:
    assert against_16_bits(0, 3 * MIB) == "nothing, where a 16-bit cache is 3.00 MiB"
    assert against_16_bits(3 * MIB, 9 * MIB) == "3.00 times smaller than a 16-bit cache"
    assert against_16_bits(9 * MIB, 3 * MIB) == "larger by 6.00 MiB than a 16-bit cache"


@pytest.mark.parametrize("length", [100, 140, 500])
def test_the_words_are_true_of_a_real_cache(length: int) -> None:
    loaded = tiny_loaded()
    held = build_cache(loaded.model.config, parse_method("turboquant:bits=4,residual_length=64"))
    loaded.model(tokens(1, length), past_key_values=held)
    found = cache_report(held)
    words = cache_size(found)
    if words.startswith("larger"):
        assert found.bytes > found.full_precision_bytes
    else:
        assert found.bytes <= found.full_precision_bytes * 1.01
