"""Tiny models as GGUF files, as llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    architecture: str = "llama",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write a tiny Llama of 256 tokens, one a byte, to a file.

    Args:
        model: Of `tiny_model("llama")`.
        path: Of the file.
        kind: Type of the matrices.
        architecture: What the header calls it.
        fields: More values of the header: numbers and strings.
        tensors: More tensors.
        change: Called with the writer before it writes.
    """
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _tokenizer(writer)
    for name, value in (fields or {}).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(name, value)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = _interleaved(values, config.head_dim)
        quantized = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_name(name), gguf.quantize(values, quantized), raw_dtype=quantized)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = list(bytes_to_unicode().values())
    merges = [(tokens[0], tokens[1]), (tokens[2], tokens[3])]  # of a single one older transformers makes no list
    tokens[-2:] = ["".join(pair) for pair in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)


def _name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{end}"


def _interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows in llama.cpp's order: the two halves of a rotated head alternate."""
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(-1, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(rows, columns))
