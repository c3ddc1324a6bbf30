"""Replayed decoding against the library's own: interpreted kernels on a CPU, a CUDA graph where there is a GPU."""

from typing import Any

import pytest
import torch

from turboquant.cache.build import build_cache
from turboquant.cache.graph import GraphDecoder
from turboquant.kernels import backend
from turboquant.methods import parse_method
from turboquant.models.tiny import tiny_model

pytest.importorskip("triton")

from turboquant.kernels.triton import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = 5e-2 if DEVICE == "cuda" else 2e-2  # bfloat16 has three bits less
SPEC = "turboquant:bits=4,group_size=32,residual_length=32,sink_length=4"
PROMPT, STEPS = 4 + 32 + 64 + 31, 3  # the second step fills the window
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*", "ignore::DeprecationWarning")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the attention kernels serve CPU tensors too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(
            "turboquant.kernels.attention.usable", lambda _, name: attention if name == "attention" else None
        )


def started(rows: int = 1) -> Any:
    model = tiny_model("llama").to(DEVICE, DTYPE)
    ids = torch.randint(0, 100, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cache = build_cache(model.config, parse_method(SPEC))
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return model, cache, logits[:, -1].argmax(dim=-1, keepdim=True)


@pytest.mark.usefixtures("interpreted")
def test_replayed_steps_are_those_of_plain_calls_across_packings() -> None:
    model, cache, token = started()
    other, plain, _ = started()
    decoder = GraphDecoder(model, cache, PROMPT + STEPS)
    packed = cache.layers[0].packed_length
    for step in range(STEPS):
        logits = decoder.step(token).clone()
        expected = other(token, past_key_values=plain).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
        token = expected.argmax(dim=-1, keepdim=True)
        assert cache.get_seq_length() == plain.get_seq_length() == PROMPT + step + 1
    assert cache.layers[0].packed_length == plain.layers[0].packed_length > packed
    storage = cache.layers[0].packed_keys.storage
    decoder.close()
    assert storage is cache.layers[0].packed_keys.storage
    again = model(token, past_key_values=cache).logits
    torch.testing.assert_close(again, other(token, past_key_values=plain).logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.usefixtures("interpreted")
def test_without_a_token_the_likeliest_goes_on() -> None:
    model, cache, token = started()
    decoder = GraphDecoder(model, cache, PROMPT + 2)
    first = decoder.step(token).argmax(dim=-1)
    assert torch.equal(decoder.ids[:, 0], first)
    decoder.step()
    with pytest.raises(ValueError, match=f"room for {PROMPT + 2} tokens"):
        decoder.step()


def test_caches_that_cannot_be_replayed_are_refused() -> None:
    model = tiny_model("llama").to(DEVICE, DTYPE)
    ids = torch.randint(0, 100, (1, 20)).to(DEVICE)
    cache = build_cache(model.config, parse_method(SPEC))
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="packed tokens"):
        GraphDecoder(model, cache, 100)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has kernels")
def test_without_kernels_the_reason_is_named() -> None:
    assert backend.usable(torch.zeros(1), "attention") is None
    model, cache, token = started()
    decoder = GraphDecoder(model, cache, PROMPT + 1)
    with pytest.raises(RuntimeError, match="Triton or CUDA is missing"):
        decoder.step(token)
    decoder.close()
    assert all(layer.lengths is None for layer in cache.layers)
