"""Which bits for my text: from a model and a limit to the smallest cache within it, and that cache in use.

    .venv/bin/python examples/recommend.py                          # the built-in model on a text that ships
    .venv/bin/python examples/recommend.py MODEL my-text.txt 0.01   # a name, hub id or folder; a text; a limit of KL

KL is how far predictions move, in nats a token: 0 is not at all. There is no natural limit; 0.01 is a strict one. The
settings here are small, so that it takes half a minute; leave them out for a search worth relying on: more recipes,
windows of 1,024 tokens, and bits layer by layer (docs/recommend.md). What is printed is measured, or marked estimated.
"""

import sys

from turboquant import build_cache, cache_report, load_model, parse_method
from turboquant.experiments.recommend import recommend
from turboquant.experiments.recommendation import RecommendSettings
from turboquant.records.verdict import against_16_bits

MODEL, TEXT, MAX_KL = [*sys.argv[1:], *("smollm2-135m", "persuasion", "0.01")[len(sys.argv) - 1 :]]

# A model that you have loaded yourself works as well: examples/own_model.py.
loaded = load_model(MODEL)

# Methods are tried on the first half of the text, from small to large as far as limits allow; the smallest one within
# the limits must be so on the second half as well.
limits = RecommendSettings(texts=(TEXT,), max_kl=float(MAX_KL), recipes=("turboquant",), context=320, layers=False)
found = recommend(loaded, limits)
for one in found.tried:
    verdict = "within the limits" if one.failure is None else one.failure
    print(f"{one.part}: {one.method}: KL {one.kl:.4f}, same top token {one.same_top_pct:.1f} %: {verdict}")
print(found.sentence)
if found.method is None:
    sys.exit(1)  # nothing is safe at this limit: raise it, or keep the full cache
if found.caution:
    print(found.caution)
for row in found.memory:
    print(f"{row.tokens:,} tokens: {against_16_bits(row.bytes, row.full_bytes)}", end=" ")
    print("(measured)" if row.measured else "(estimated)")

# The setting in use: stock generate() with that cache. Greedy, so a difference comes from the cache alone.
prompt = "The keeper of the lighthouse wrote down every ship that passed. " * 20 + "\nOn the last page he wrote"
inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
for spec in ("full", found.method):
    cache = build_cache(loaded.model.config, parse_method(spec))
    ids = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
    answer = loaded.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])
    report = cache_report(cache)
    print(f"{spec}: {answer!r}, {report.bytes:,} bytes held, {report.compressed_tokens} tokens packed")
