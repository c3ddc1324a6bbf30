"""Repositories whose weights are stored quantized: loaded as what is said, or refused in words before that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tests.support.models import save_tiny, tiny_tokenizer
from turboquant.models import checks
from turboquant.models import load as models
from turboquant.models.load import ModelError, load_model

IDS = torch.arange(3, 60)[None]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
quantizes = pytest.mark.filterwarnings("ignore")


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tiny_gpt_oss() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gpt_oss",
        **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4},
        **{"num_experts_per_tok": 2, "sliding_window": 32, "pad_token_id": 0, "eos_token_id": 2},
        **{"layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 512},
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of a matrix, as the published files have them: blocks of 32, two values in a byte.

    Args:
        weight: [experts, in, out].

    Returns:
        Bytes [experts, out, in / 32, 16] and exponents [experts, out, in / 32] of base 2, plus 127.
    """
    grouped = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (grouped.abs().amax(-1).clamp_min(1e-30) / 6).log2().ceil()
    codes = (grouped[..., None] / exponents.exp2()[..., None, None] - FP4).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def read_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
    return (values * (scales.float() - 127).exp2()[..., None]).flatten(-2).transpose(1, 2)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with its experts in MXFP4, as openai/gpt-oss-20b has them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-oss"
    tiny_gpt_oss().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        state[f"{name}_blocks"], state[f"{name}_scales"] = mxfp4(state.pop(name))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return folder


@pytest.mark.parametrize(("asked", "weights"), [("auto", "bf16"), ("fp32", "fp32")])
def test_mxfp4_is_written_out(gpt_oss: Path, asked: str, weights: str) -> None:
    loaded = load_model(str(gpt_oss), weights=asked, device="cpu")
    assert (loaded.weights, loaded.stored) == (weights, "mxfp4")
    assert not hasattr(loaded.model.config, "quantization_config")
    state, own = load_file(gpt_oss / "model.safetensors"), loaded.model.state_dict()
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        expected = read_mxfp4(state[f"{name}_blocks"], state[f"{name}_scales"])
        assert expected.std() > 0.01
        assert torch.equal(own[name].float(), expected)
    plain = tiny_gpt_oss()
    assert torch.equal(own["model.layers.1.self_attn.sinks"].float(), plain.model.layers[1].self_attn.sinks.float())


def test_other_precisions_are_refused(gpt_oss: Path) -> None:
    with pytest.raises(ModelError, match=r"stored as mxfp4, which is loaded as bf16 or fp32: .* got weights=4bit"):
        load_model(str(gpt_oss), weights="4bit", device="cpu")


@pytest.mark.parametrize(("asked", "weights"), [("auto", "bf16"), ("fp32", "fp32")])
def test_fp8_is_written_out(tmp_path: Path, asked: str, weights: str) -> None:
    """As DeepSeek-V3 has it: blocks of 128 x 128 with a float32 scale each, and bfloat16 beside them."""
    folder = save_tiny(tmp_path / "tiny", hidden_size=256, intermediate_size=384)
    state, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in state if "_proj" in name]:
        blocks = state[name].unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        expected[name] = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
        state[name], state[f"{name}_scale_inv"] = codes.flatten(2).flatten(0, 1), scales
    state = {name: tensor if "_proj" in name else tensor.bfloat16() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    saved = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    change_config(folder, quantization_config=saved)
    loaded = load_model(str(folder), weights=asked, device="cpu")
    assert (loaded.weights, loaded.stored) == (weights, "fp8")
    own = loaded.model.state_dict()
    assert len(expected) == 21
    assert all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in own.values()} == {loaded.model.dtype}


def test_fp8_with_one_scale_a_matrix_is_written_out(tmp_path: Path) -> None:
    """As Ministral 3 has it, with scales of activations, which plain numbers do not need."""
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    state, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in state if "_proj" in name]:
        scale = (state[name].abs().max() / 448).bfloat16()
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = state[name].float() * scale
        state |= {f"{name}_scale_inv": scale, name.replace(".weight", ".activation_scale"): torch.tensor(0.5)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    saved = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    change_config(folder, quantization_config={**saved, "modules_to_not_convert": ["lm_head"]})
    own = load_model(str(folder), device="cpu").model.state_dict()
    assert len(expected) == 7
    assert all(torch.equal(own[name], tensor.bfloat16()) for name, tensor in expected.items())


@quantizes
@pytest.mark.parametrize("weights", ["4bit", "8bit"])
def test_bitsandbytes_is_loaded_as_it_is(tmp_path: Path, weights: str) -> None:
    folder = save_tiny(tmp_path / "tiny")
    how = BitsAndBytesConfig(**{f"load_in_{weights}": True})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(folder)
    loaded = load_model(str(folder), device="cpu")
    assert (loaded.weights, loaded.stored) == (weights, "bitsandbytes")
    assert (loaded.model(IDS).logits - model(IDS).logits).abs().max() < 0.1
    with pytest.raises(ModelError, match=f"is loaded as {weights}: use weights=auto or {weights}, got weights=fp32"):
        load_model(str(folder), weights="fp32", device="cpu")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"stored as gptq, which cannot be loaded on cpu: it needs the package"),
        ({"quant_method": "awq", "bits": 4}, r"stored as awq, .* needs the package gptqmodel"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "needs the package compressed.tensors"),
        ({"quant_method": "aqlm"}, "stored as aqlm, which cannot be loaded on cpu"),
        ({"quant_method": "from-next-year"}, "stored as from-next-year, .* this version of transformers does not know"),
        ({"quant_method": 7}, "stored as 7, .* does not know"),
        ({"bits": 4}, "stored as None, .* does not know"),
        ({"quant_method": "gptq", "bits": "many"}, "stored as gptq, which cannot be loaded on cpu"),
        ("gptq", "configuration that this version of transformers does not know"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_the_weights_are_fetched(
    tmp_path: Path, saved: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    change_config(folder, quantization_config=saved)
    monkeypatch.setattr(models, "_load_weights", None)
    with pytest.raises(ModelError, match=words) as refused:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(refused.value)


def test_memory_is_that_of_what_is_written_out(gpt_oss: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_bytes", lambda device: 300_000)
    with pytest.raises(ModelError, match=r"tiny-oss as bf16 needs .* choose a smaller model: .* fit as bf16"):
        load_model(str(gpt_oss), device="cpu")
