"""Your own Hugging Face model, stock `generate()`, and a compressed cache.

    .venv/bin/python examples/own_model.py                # a tiny model with random weights takes the place of yours
    .venv/bin/python examples/own_model.py my-folder      # a folder or hub id, as for `from_pretrained`

`attach` sets the attention function that reads packed keys and values, and checks it; with any other cache, or none,
the model then runs exactly as with SDPA.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM

from turboquant import attach, build_cache, cache_report, parse_method, tiny_model

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("qwen3").save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)

print(attach(model))

# Token ids stand for a tokenized prompt here; with a tokenizer: **tokenizer(text, return_tensors="pt").
prompt = torch.arange(3, 243)[None]
inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}

answers = {}
for spec in ("full", "turboquant:bits=4", "turboquant:bits=1"):
    cache = build_cache(model.config, parse_method(spec))  # empty; one for each text, conversation or batch
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False, pad_token_id=0)
    answers[spec] = ids[0, prompt.shape[1] :].tolist()
    report = cache_report(cache)
    same = sum(a == b for a, b in zip(answers["full"], answers[spec], strict=False))
    print(f"{spec}: {report.compressed_layers} layers, {report.compressed_tokens} of {report.tokens} tokens packed,")
    print(f"    {report.bytes:,} bytes, {same} of {len(answers['full'])} tokens as with the full cache")
