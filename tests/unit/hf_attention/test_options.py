"""What a model asks of attention beyond q, k and v: computed, harmless, or refused in one sentence."""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from tests.support.models import tokens
from turboquant import hf_attention
from turboquant.cache.build import build_cache, cache_report
from turboquant.hf_attention import CAP, DROPPED, SINKS, attention_forward
from turboquant.methods import parse_method
from turboquant.models.dry_run import Lossless
from turboquant.models.load import tiny_model

# Options of attention calls in transformers that change nothing here: SDPA computes them, or they say again what the
# mask says, or only other attention functions need them.
COMPUTED = {"query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "position_bias", SINKS, CAP}
TOLD_BY_THE_MASK = {"sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"}
FOR_OTHERS = {"output_attentions", "deterministic"}

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
}
# Models whose attention needs what is not computed here: chosen tokens, summaries of tokens.
REFUSED = {
    "DeepseekV4": (
        {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 32, "num_hidden_layers": 6},
        "attention to summaries of tokens",
    ),
    "DeepseekV32": (
        {
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "index_topk": 8,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "first_k_dense_replace": 4,
        },
        "attention to chosen tokens alone",
    ),
}


def random_model(kind: str, **fields):
    """A tiny model of a class of transformers, set to our attention function."""
    config_class = getattr(transformers, f"{kind}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **fields}), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
    hf_attention.register()
    model.set_attn_implementation("turboquant")
    return model.eval().requires_grad_(False)


def test_every_option_of_every_model_in_transformers_is_known() -> None:
    """A new release whose models ask for something new must be looked at: is it computed, harmless, or refused?"""
    found: dict[str, set[str]] = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attention_interface":
                for keyword in filter(None, (keyword.arg for keyword in node.keywords)):
                    found.setdefault(keyword, set()).add(path.parent.name)
    assert len(found) > 8
    unknown = found.keys() - COMPUTED - TOLD_BY_THE_MASK - FOR_OTHERS - DROPPED.keys()
    assert not unknown, {name: sorted(found[name]) for name in unknown}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("cache", ["none", "full", "compressed"])
def test_models_whose_attention_is_more_are_refused_in_one_sentence(kind: str, cache: str) -> None:
    fields, words = REFUSED[kind]
    model = random_model(kind, **fields)
    caches = {
        "none": None,
        "full": DynamicCache(config=model.config),
        "compressed": build_cache(model.config, parse_method("turboquant")),
    }
    with pytest.raises(ValueError, match=f"does not compute {words}.*would be wrong") as caught:
        model(tokens(1, 40), past_key_values=caches[cache])
    assert "\n" not in str(caught.value)


# Scores that are more than products; caps are low, so that they bend what these small models score.
WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
MORE = {
    "GptOss": {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2},
    "Gemma2": {**WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64},
    "VaultGemma": {**WINDOW, "attn_logit_softcapping": 2.0},
    "GraniteSWA": WINDOW,
}


def more_model(kind: str):
    model = random_model(kind, **MORE[kind])
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "sinks", None) is not None:
                module.sinks.normal_(1.0, 2.0)
    return model


def logits_of(model, ids, mask, method, pieces=(100, 7, 1, 30)):
    cache = None if method is None else build_cache(model.config, method)
    if cache is None:
        return model(ids, attention_mask=mask).logits
    parts, start = [], 0
    for piece in pieces:
        stop = start + piece
        parts.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
        start = stop
    if method.compresses:
        assert cache_report(cache).compressed_layers == 2
        assert cache_report(cache).compressed_tokens > 100
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("padded", [0, 9], ids=["", "padded"])
@pytest.mark.parametrize("kind", MORE)
def test_sinks_and_caps_are_computed_as_the_model_itself_does(kind: str, padded: int) -> None:
    """In full and in sliding layers, without a cache, with Hugging Face's and with packed keys and values."""
    model = more_model(kind)
    ids = tokens(2, 138)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    model.set_attn_implementation("eager")
    expected = logits_of(model, ids, mask, parse_method("full"))[mask.bool()]
    bent = [module.sinks for module in model.modules() if getattr(module, "sinks", None) is not None]
    model.set_attn_implementation("turboquant")
    for method in (None, parse_method("full"), Lossless()):
        actual = logits_of(model, ids, mask, method)[mask.bool()]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    # These figures would see it if they were left out.
    for sinks in bent:
        sinks.data.fill_(-1e4)
    for module in model.modules():
        if getattr(module, "attn_logit_softcapping", None):
            module.attn_logit_softcapping = None
    without = logits_of(model, ids, mask, Lossless())[mask.bool()]
    assert (without - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["GptOss", "Gemma2"])
def test_sinks_and_caps_take_additive_masks_and_give_gradients(kind: str) -> None:
    model = more_model(kind).requires_grad_(True)
    ids = tokens(1, 24)
    hidden = torch.full((24, 24), torch.finfo(torch.float32).min).triu(1)[None, None]
    masks: dict = {"full_attention": hidden, "sliding_attention": hidden}
    expected: list[torch.Tensor] = []
    actual: list[torch.Tensor] = []
    for found, name in ((expected, "eager"), (actual, "turboquant")):
        model.set_attn_implementation(name)
        model.zero_grad()
        with torch.enable_grad():
            model(ids, attention_mask=masks).logits.square().mean().backward()
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(expected) == len(actual) > 10
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_dropout_beside_sinks_is_refused() -> None:
    model = random_model("GptOss", **MORE["GptOss"], attention_dropout=0.5).train()
    with pytest.raises(ValueError, match="learned sinks or capped scores does not support dropout"):
        model(tokens(1, 10))


@pytest.mark.parametrize("option", [*DROPPED, "sink_of_a_new_model"])
@pytest.mark.parametrize("compressed", [False, True])
def test_dropped_options_are_refused_before_anything_is_computed(llama, option: str, compressed: bool) -> None:
    cache = build_cache(llama.config, parse_method("turboquant" if compressed else "full"))
    llama(tokens(1, 20), past_key_values=cache)
    value = torch.nn.Parameter(torch.zeros(4)) if option == "sink_of_a_new_model" else torch.zeros(4)
    states = torch.randn(2, 1, 2, 1, 64)
    keys, values = cache.update(*states, 0)
    with pytest.raises(ValueError, match=f"'{option}'"):
        attention_forward(
            llama.model.layers[0].self_attn, torch.randn(1, 4, 1, 64), keys, values, None, **{option: value}
        )
    if compressed:  # the call has left nothing behind
        assert cache.layers[0].get_seq_length() == 20
        llama(tokens(1, 3), past_key_values=cache)


@pytest.mark.parametrize("option", DROPPED)
def test_an_option_that_is_none_is_not_used(llama, option: str) -> None:
    keys, values = torch.randn(2, 1, 2, 5, 64)
    output, _ = attention_forward(
        llama.model.layers[0].self_attn, torch.randn(1, 4, 5, 64), keys, values, None, **{option: None}
    )
    assert output.shape == (1, 5, 4, 64)


def test_dropout_is_refused_and_leaves_the_cache_as_it_was() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    cache = build_cache(model.config, parse_method("turboquant:bits=4"))
    with pytest.raises(ValueError, match=r"does not support dropout in attention: call model.eval\(\)"):
        model(tokens(1, 150), past_key_values=cache)
    model.eval()
    fresh = build_cache(model.config, parse_method("turboquant:bits=4"))
    logits = [model(tokens(1, 150), past_key_values=one).logits for one in (cache, fresh)]
    assert torch.equal(*logits)


GEMMA3N = {
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": [128] * 6,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 32,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 6,
}


SHORT_WINDOW = "residual_length=16"


@pytest.mark.parametrize("spec", [f"turboquant:bits=2,{SHORT_WINDOW}", f"kivi:bits=2,{SHORT_WINDOW}", "rtn:bits=2"])
def test_layers_that_share_keys_and_values_read_their_own_prompt_exactly(spec: str) -> None:
    """Gemma 3n: the last layers read what an earlier one computed; it packs once all of them have read."""
    model = random_model("Gemma3nText", **GEMMA3N)
    ids = tokens(1, 180)
    caches = build_cache(model.config, parse_method("full")), build_cache(model.config, parse_method(spec))
    expected, actual = (model(ids, past_key_values=cache).logits for cache in caches)
    assert torch.equal(actual, expected)
    report = cache_report(caches[1])
    assert report.compressed_layers == 2
    assert report.compressed_tokens >= 96
    expected, actual = (model(tokens(1, 5, seed=1), past_key_values=cache).logits for cache in caches)
    assert not torch.equal(actual, expected)


def test_shared_layers_are_nearly_exact_at_eight_bits() -> None:
    model = random_model("Gemma3nText", **GEMMA3N)
    caches = [
        build_cache(model.config, parse_method(spec)) for spec in ("full", "turboquant:bits=8,residual_length=16")
    ]
    for start in range(0, 200, 40):
        ids = tokens(2, 200)[:, start : start + 40]
        expected, actual = (model(ids, past_key_values=cache).logits for cache in caches)
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def test_sharing_that_the_configuration_does_not_tell_is_refused() -> None:
    model = random_model("Gemma3nText", **GEMMA3N)
    cache = build_cache(model.config, parse_method("turboquant"))
    for layer in cache.layers:
        layer.last_reader = None
    with pytest.raises(ValueError, match="layer 3 are read again after it has packed them"):
        model(tokens(1, 40), past_key_values=cache)
