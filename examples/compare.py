"""Two answers side by side: the same prompt and seed, once with the full cache and once with a compressed one.

    .venv/bin/python examples/compare.py                         # the built-in model at 2 bits
    .venv/bin/python examples/compare.py turboquant:bits=4       # another method: `turboquant methods --list`

It is what the Compare page does; the `Comparison` that comes back is what the app exports. What is printed is measured.
"""

import sys

from turboquant import Settings, compare, load_model, parse_method
from turboquant.records.verdict import cache_size, verdict

METHOD = sys.argv[1] if len(sys.argv) > 1 else "turboquant:bits=2"

loaded = load_model("smollm2-135m")

# A cache packs a token once 64 newer ones are there, so a prompt needs some length before anything is compressed.
story = "The keeper lit the lamp before the ships came in, and wrote down the name of every one. " * 16
settings = Settings(max_new_tokens=24, temperature=0.7, seed=1)  # the same draws on both sides
found = compare(loaded, story + "\nGo on with the story.", parse_method(METHOD), settings)

for name, side in (("full cache", found.original), (METHOD, found.compressed)):
    print(f"{name}:\n    {side.text.strip()!r}\n    {side.tokens_per_second or 0:.1f} tokens a second")
print(verdict(found))

report = found.compressed.report
print(f"{report.compressed_tokens} of {report.tokens} tokens are packed: {cache_size(report)}")
if found.tokens and found.heads:  # None where nothing was packed; found.notes says so
    print(f"KL {found.tokens.mean_kl:.4f} nats a token, same top token {found.tokens.same_top_pct:.0f} %")
    print(f"heads at risk {found.heads.packed.heads_at_risk_pct:.0f} %")
