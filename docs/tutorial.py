"""From "my model" to "my safe setting", in one script.

    .venv/bin/python docs/tutorial.py                          # the built-in model on a text that ships: half a minute
    .venv/bin/python docs/tutorial.py MODEL my-text.txt 0.01   # yours: a name, hub id or folder; a text; a limit of KL

Every number it prints is measured here, or marked as estimated.
"""

import sys

from turboquant import build_cache, cache_report, load_model, parse_method
from turboquant.experiments.base import Watch
from turboquant.experiments.recommend import recommend
from turboquant.experiments.recommendation import RecommendSettings
from turboquant.records.verdict import against_16_bits
from turboquant.sizing import kv_bytes, read_config

MODEL, TEXT, MAX_KL = [*sys.argv[1:], *("smollm2-135m", "persuasion", "0.01")[len(sys.argv) - 1 :]]

# 1. My model. A model that you have loaded yourself works as well: docs/library.md, "Your own model".
loaded = load_model(MODEL)
print(f"{MODEL}: {loaded.weights} on {loaded.device}")

# 2. What is at stake: bytes of its cache at its longest context, full and at 4 bits. That takes no forward pass.
shape = read_config(loaded.model.config.to_dict())
longest = shape.max_positions or 8192
for spec in ("full", "turboquant:bits=4"):
    size = kv_bytes(shape, parse_method(spec), longest)
    print(f"{spec}: {size.bytes / 1e6:,.0f} MB at {longest:,} tokens (estimated)")

# 3. My limit. KL is how far predictions move, in nats a token: 0 is not at all. With the recommended recipe the
#    built-in model has about 0.0015 at 4 bits, 0.007 at 3 and 0.03 at 2 (docs/guide.md). There is no natural limit;
#    0.01 is a strict one. Small settings here, so that it takes seconds; leave them out for a search worth relying on:
#    more recipes, windows of 1,024 tokens, and bits layer by layer.
limits = RecommendSettings(texts=(TEXT,), max_kl=float(MAX_KL), recipes=("turboquant",), context=320, layers=False)

# 4. The search: methods are tried on the first half of the text, and the smallest one that stays within the limits must
#    do so on the second half as well.
said: list[str] = []


def show(fraction: float, text: str) -> None:
    """Print each step once."""
    if text not in said:
        said.append(text)
        print(f"{100 * fraction:3.0f} % {text}")


found = recommend(loaded, limits, Watch(progress=show))
for one in found.tried:
    verdict = "within the limits" if one.failure is None else one.failure
    print(f"{one.part}: {one.method}: KL {one.kl:.4f}, same top token {one.same_top_pct:.1f} %: {verdict}")
print(found.sentence)
if found.method is None:
    sys.exit(1)  # nothing is safe at this limit: raise it, or keep the full cache
if found.caution:
    print(found.caution)
for row in found.memory:
    print(
        f"{row.tokens:,} tokens: {against_16_bits(row.bytes, row.full_bytes)} "
        f"({'measured' if row.measured else 'estimated'})"
    )

# 5. My safe setting, in use: stock generate() with that cache. Greedy, so a difference to the full cache's answer comes
#    from the cache alone. A new text needs a new cache.
prompt = "The keeper of the lighthouse wrote down every ship that passed. " * 20 + "\nOn the last page he wrote"
inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
answers = {}
for spec in ("full", found.method):
    cache = build_cache(loaded.model.config, parse_method(spec))
    ids = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
    answers[spec] = loaded.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])
    report = cache_report(cache)
    print(f"{spec}: {answers[spec]!r}, {report.bytes:,} bytes held, {report.compressed_tokens} tokens packed")
