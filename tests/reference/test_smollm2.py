"""The built-in model answers twice for real: what compression changes, what it saves, and if the record adds up."""

import math
import subprocess
import sys

import pytest
import torch

from turboquant.methods import parse_method
from turboquant.models.embedded import is_available
from turboquant.models.load import LoadedModel, load_model
from turboquant.records.comparison import CacheReport, Comparison, Settings
from turboquant.run.compare import compare, prompt_ids

pytestmark = pytest.mark.skipif(not is_available(), reason="the built-in model's package is not installed")

LOG = (
    "The harbour log for the first week of March. Monday: the ferry left at seven with forty passengers and two cars; "
    "the wind was from the west and the sea was calm. Tuesday: fog until noon, so the ferry waited at the quay and the "
    "post came by land. Wednesday: the crane was repaired, and the blue boat from Norway unloaded ninety crates of "
    "salted cod. Thursday: the inspector counted everything twice and found one crate of candles that nobody had "
    "ordered. Friday: the candles were given to the lighthouse, whose keeper signed for them in green ink. Saturday: "
    "rain all day, no boats. Sunday: the bells rang and the children raced paper ships along the pier.\n"
)
PROMPT = LOG * 2 + "\nOn which day were the candles given to the lighthouse, and who signed for them?"
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
SETTINGS = Settings(max_new_tokens=24)


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2-135m", weights="fp32", device="cpu")


def run(loaded: LoadedModel, spec: str) -> Comparison:
    with torch.no_grad():
        return compare(loaded, PROMPT, parse_method(spec), SETTINGS)


@pytest.fixture(scope="module")
def four_bits(smollm2: LoadedModel) -> Comparison:
    return run(smollm2, "turboquant:bits=4")


@pytest.fixture(scope="module")
def published_two_bits(smollm2: LoadedModel) -> Comparison:
    return run(smollm2, "turboquant-paper:bits=2")


def test_paris(smollm2: LoadedModel) -> None:
    result = compare(smollm2, "What is the capital of France?", parse_method("turboquant:bits=4"), SETTINGS)
    assert "Paris" in result.original.text
    assert result.original.finish == "stop"
    assert result.compressed.text == result.original.text
    assert result.heads is None  # too short to pack anything, and the note says so
    assert "packing starts at 132" in result.notes[0]


def test_four_bits_answer_as_the_full_cache_does(smollm2: LoadedModel, four_bits: Comparison) -> None:
    """Greedy answers agree for as long as they were seen to, and heads and tokens agree as far as they should."""
    assert "lighthouse" in four_bits.original.text
    assert four_bits.original.token_ids[:8] == four_bits.compressed.token_ids[:8]
    heads, tokens = four_bits.heads, four_bits.tokens
    assert heads is not None
    assert tokens is not None
    assert heads.layer_indices == list(range(LAYERS))
    assert [len(row) for row in heads.packed.per_head_top1] == [QUERY_HEADS] * LAYERS
    # Measured when written: 82.9 and 97.7 % top-1, cosine 0.998, KL 0.0012 nats.
    assert 70 < (heads.packed.top1_match_pct or 0) < 100
    assert (heads.served.top1_match_pct or 0) > 92
    assert (heads.packed.top5_match_pct or 0) > 97
    assert 0.99 < (heads.packed.cosine_scores or 0) < 1
    assert all(math.isfinite(kl) and kl >= 0 for kl in tokens.kl)
    assert 0 < tokens.mean_kl < 0.02
    assert tokens.same_top_pct > 85
    assert all(p > 1 / 49152 for p in tokens.probability_full)


def assert_adds_up(report: CacheReport, tokens: int) -> None:
    """The parts are the whole, and the baseline is 2 bytes for each value of keys and values."""
    parts = ("key", "value", "scale", "exact", "spare", "shared")
    values = tokens * LAYERS * KV_HEADS * HEAD_DIM * 2
    assert report.tokens == tokens == report.compressed_tokens + report.exact_tokens
    assert report.bytes == sum(getattr(report, f"{part}_bytes") for part in parts)
    assert report.full_precision_bytes == 2 * values
    assert report.bits_per_value == pytest.approx(8 * report.bytes / values)
    assert report.compression_ratio == pytest.approx(16 / report.bits_per_value)


def test_the_reports_add_up(smollm2: LoadedModel, four_bits: Comparison) -> None:
    prompt = prompt_ids(smollm2, PROMPT).shape[1]
    assert 300 < prompt < 360
    assert four_bits.prompt_tokens == prompt
    full, compressed = four_bits.original, four_bits.compressed
    for side in (full, compressed):
        # An answer that was stopped by the end token has fed all its tokens back, one cut by length all but the last.
        fed = len(side.token_ids) - (side.finish == "length")
        assert_adds_up(side.report, prompt + fed)
        assert len(side.cache_bytes) == fed + 1
        assert side.cache_bytes[-1] == side.report.bytes
        assert len(side.token_texts) == len(side.token_ids)
    packed = compressed.report.compressed_tokens
    assert packed == parse_method("turboquant:bits=4").packed_length(compressed.report.tokens)
    per_side = packed * LAYERS * KV_HEADS * HEAD_DIM // 2  # 4 bits a value
    assert (compressed.report.key_bytes, compressed.report.value_bytes) == (per_side, per_side)
    assert compressed.report.compressed_layers == compressed.report.layers == LAYERS
    assert compressed.report.payload_ratio == 4
    assert full.report.bits_per_value == 32  # the run keeps its exact tokens in float32
    assert compressed.report.bytes < full.report.bytes / 2


def test_two_bits_as_published_change_the_answer(four_bits: Comparison, published_two_bits: Comparison) -> None:
    two = published_two_bits
    assert two.original.token_ids == four_bits.original.token_ids
    assert two.divergence is not None
    assert two.compressed.text != two.original.text
    fed = len(two.compressed.cache_bytes) - 1
    assert_adds_up(two.compressed.report, two.prompt_tokens + fed)
    assert two.compressed.report.exact_tokens == 0
    assert two.compressed.report.compression_ratio > 3  # nothing exact, so even this length is well below 16 bits
    assert two.heads is not None
    assert four_bits.heads is not None
    assert (two.heads.packed.top1_match_pct or 0) < 0.5 * (four_bits.heads.packed.top1_match_pct or 0)
    assert two.tokens is not None
    assert four_bits.tokens is not None
    assert two.tokens.mean_kl > 20 * four_bits.tokens.mean_kl
    assert two.tokens.kl[0] == 0


def test_a_loaded_model_has_its_kernels_compiled() -> None:
    """The first answer must not wait for a compiler: loading the model in a fresh process compiles them."""
    code = (
        "from turboquant import load_model; load_model('smollm2-135m', device='cpu')\n"
        "import sys; print('turboquant.kernels.cpu.attention' in sys.modules)\n"
        "from turboquant.kernels.cpu.codes import _combine, _scores\n"
        "print(len(_scores.signatures), len(_combine.signatures))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["True", "1", "1"]
