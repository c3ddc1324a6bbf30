"""Which models load: asked of the models themselves, family by family, each a tiny one with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.families import IMAGE_TEXT, REFUSED, WORKS
from tests.support.models import tiny_tokenizer
from turboquant import DryRunError, attach, build_cache, cache_report, compare, hf_attention, parse_method
from turboquant.models.families import FAMILIES, Family, family_model
from turboquant.models.load import LoadedModel, ModelError, ModelSpec, load_model
from turboquant.records.comparison import Settings
from turboquant.run.feed import feed, step
from turboquant.run.memory import full_bytes
from turboquant.sizing import read_config

BERT = Family("bert", "BERT", 0, "bert")
GEMMA4 = Family("gemma4", "", 0, "gemma4_text", {"global_head_dim": 128, "hidden_size_per_layer_input": 0})
ONE_A_REASON = {reason: name for name, reason in REFUSED.items() if name != "gemma3n"}
METHOD = parse_method("turboquant:bits=4,residual_length=16,group_size=32")
PROMPT = "The keeper of the lighthouse wrote down the weather, the ships and the colour of the sea. "


@pytest.mark.parametrize("name", WORKS)
def test_a_family_that_works_says_the_same_as_by_its_own_attention(name: str) -> None:
    model: Any = family_model(FAMILIES[name])
    found = attach(model)
    assert found.compressed_layers == WORKS[name]
    assert found.error < 1e-4
    cache = build_cache(model.config, METHOD)
    ids = torch.arange(3, 123)[None]
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 124)
    assert cache_report(cache).compressed_layers == WORKS[name]
    assert cache_report(cache).compressed_tokens > 0


@pytest.mark.parametrize("name", [*ONE_A_REASON.values(), "bert"])
def test_a_family_that_does_not_is_refused_with_the_reason_and_left_as_it_was(name: str) -> None:
    model = family_model(FAMILIES.get(name, BERT))
    before = model.config._attn_implementation
    with pytest.raises(DryRunError, match=REFUSED.get(name, "reads a prompt both ways")):
        attach(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2", "phi4-mini-hub", "jamba"])
def test_a_comparison_of_such_a_model_has_all_figures(name: str) -> None:
    model: Any = family_model(FAMILIES[name])
    attach(model)
    loaded = LoadedModel(model, tiny_tokenizer(), ModelSpec("tiny", "test/tiny", None, ""), "fp32", "cpu")
    found = compare(loaded, PROMPT * 2, METHOD, Settings(max_new_tokens=4))
    assert found.notes == []
    assert found.heads is not None
    assert len(found.heads.layer_indices) == WORKS[name]
    assert found.heads.served.cosine_weights is not None
    assert found.heads.served.cosine_weights > 0.9
    assert found.tokens is not None
    assert 0 < found.tokens.mean_kl < 0.2


def test_a_model_that_takes_tokens_one_by_one_is_given_them_so() -> None:
    """Jamba: several tokens behind a filled cache come out wrong by transformers' own code."""
    model: Any = family_model(FAMILIES["jamba"])
    assert attach(model).one_by_one
    ids = torch.arange(3, 63)[None]
    expected = model(ids).logits[0]
    cache = build_cache(model.config, parse_method("full"))
    parts = [logits for _, logits in feed(model, cache, ids, [(0, 40), (40, 60)], at_once=16)]
    assert [part.shape[1] for part in parts] == [16] + 44 * [1]
    torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected, atol=1e-4, rtol=1e-4)
    cache = build_cache(model.config, parse_method("full"))
    step(model, cache, ids[:, :40])
    torch.testing.assert_close(step(model, cache, ids[:, 40:])[0], expected[-1], atol=1e-4, rtol=1e-4)
    # Planted: by several tokens at once it is wrong, so this test can see it.
    cache = build_cache(model.config, parse_method("full"))
    model(ids[:, :40], past_key_values=cache)
    assert (model(ids[:, 40:], past_key_values=cache).logits[0, -1] - expected[-1]).abs().max() > 0.01
    assert not attach(family_model(FAMILIES["llama-3"])).one_by_one
    assert attach(family_model(FAMILIES["jamba"]).to(torch.bfloat16)).one_by_one
    assert not attach(family_model(FAMILIES["lfm2"]).to(torch.bfloat16)).one_by_one


def test_llama_vision_keeps_what_it_saw_of_an_image_as_it_is() -> None:
    model: Any = family_model(FAMILIES["mllama"])
    assert attach(model).compressed_layers == 3
    cache = build_cache(model.config, METHOD)
    out = model.generate(torch.arange(3, 123)[None], past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 124)
    assert cache_report(cache).compressed_layers == 3


def test_an_earlier_answer_does_not_disturb_the_check() -> None:
    """Qwen-VL remembers where the positions of its last answer stood, for its rows."""
    model: Any = family_model(FAMILIES["qwen2.5-vl"])
    model.generate(torch.arange(3, 23).view(2, 10), max_new_tokens=2, do_sample=False)
    kept = model.model.rope_deltas
    assert attach(model).compressed_layers == 4
    assert model.model.rope_deltas is kept


def saved(folder: Path, name: str) -> str:
    family_model(FAMILIES[name]).save_pretrained(folder)
    tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_an_image_text_model_is_loaded_and_compared_as_text(name: str, tmp_path: Path) -> None:
    loaded = load_model(saved(tmp_path, name), weights="fp32", device="cpu")
    found = compare(loaded, PROMPT * 2, METHOD, Settings(max_new_tokens=4))
    assert found.compressed.report.compressed_tokens > 0
    assert found.tokens is not None
    assert found.tokens.mean_kl < 0.2
    assert found.heads is not None


def test_the_sizes_of_layers_of_two_widths_are_added_up() -> None:
    model = family_model(GEMMA4)
    held = full_bytes(model.config, "bf16", 400)  # three layers of 64 with a window of 32, one of 128
    assert held == 2 * 2 * (400 * 128 + 3 * 32 * 64) * 2


def test_a_window_no_shorter_than_the_positions_is_none() -> None:
    config = {"model_type": "phi3", "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 128}
    config |= {"sliding_window": 262_144, "max_position_embeddings": 131_072}
    assert read_config(config).packed_layers == (0, 1, 2, 3)
    assert [layer.window for layer in read_config({**config, "sliding_window": 2047}).layers] == [2047] * 4


@pytest.mark.parametrize("name", ["qwen3.5-text", "lfm2", "granite-4-h"])
def test_recurrent_states_are_counted(name: str) -> None:
    model = family_model(FAMILIES[name])
    attach(model)
    sizes = []
    for count in (40, 120):
        cache = build_cache(model.config, METHOD)
        model(torch.arange(3, 3 + count)[None] % 256, past_key_values=cache)
        report = cache_report(cache)
        states = [
            tensor
            for layer in cache.layers
            for kept in vars(layer).values()
            if isinstance(kept, dict)
            for tensor in kept.values()
            if isinstance(tensor, torch.Tensor)
        ]
        assert report.state_bytes == sum(tensor.untyped_storage().nbytes() for tensor in states) > 0
        parts = (report.key_bytes, report.value_bytes, report.scale_bytes, report.exact_bytes, report.spare_bytes)
        assert report.bytes == sum(parts) + report.shared_bytes + report.state_bytes
        values = report.full_precision_bytes - report.state_bytes  # two bytes a number
        assert report.bits_per_value == 16 * (report.bytes - report.state_bytes) / values
        assert report.compression_ratio == report.full_precision_bytes / report.bytes
        sizes.append(report.state_bytes)
    assert sizes[0] == sizes[1]


def test_a_model_that_is_attached_already_is_asked_again_by_its_own_attention() -> None:
    model: Any = family_model(FAMILIES["qwen3"])
    first = attach(model)
    model.train()
    assert attach(model) == first
    assert model.training
    assert model.config._attn_implementation == "turboquant"
    model.eval()
    wrong = model.model.layers[0].self_attn
    wrong.scaling *= 2  # the library's own attention is asked with the same model, so only the cache could differ
    assert attach(model).error < 1e-4


def test_an_attention_that_says_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the scale in our attention function alone."""
    told = hf_attention.sdpa_attention_forward

    def doubled(module, query, key, value, mask, dropout, scaling, **more):
        return told(module, query, key, value, mask, dropout, 2 * scaling, **more)

    monkeypatch.setattr(hf_attention, "sdpa_attention_forward", doubled)
    for attached in (False, True):
        model: Any = family_model(FAMILIES["qwen3"])
        if attached:
            hf_attention.register()
            model.set_attn_implementation("turboquant")
        with pytest.raises(DryRunError, match="says something else than by its own attention"):
            attach(model)


def test_a_refusal_while_loading_is_one_sentence(tmp_path: Path) -> None:
    family_model(FAMILIES["bamba"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be used here: transformers itself computes") as caught:
        load_model(str(tmp_path), weights="fp32", device="cpu")
    assert len(str(caught.value).splitlines()) == 1
