#!/bin/sh
# Run what touches transformers with the oldest and the newest version that pyproject.toml allows, or with the versions
# named: tests/compat/transformers_range.sh 5.17.0 5.20.0
# Each version gets a throw-away environment over .venv (overlay.sh), so nothing but transformers and what it asks for
# is installed. PYTEST_ARGS is passed on.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Caches, attention, generation, loading, probes, tasks and the command line; no pages, no kernels, no figures.
tests="tests/unit/cache/test_cache.py tests/unit/cache/test_foreign.py tests/unit/cache/test_hf_generate.py
    tests/unit/run/test_generate.py tests/unit/experiments/test_heads.py tests/unit/models/test_load.py
    tests/unit/models/test_hub.py tests/unit/models/test_gguf.py tests/unit/models/test_stored.py
    tests/unit/models/test_placement.py tests/unit/run/test_heads.py tests/unit/run/test_chat.py
    tests/unit/run/test_compare.py tests/unit/run/test_scoring.py tests/unit/sizing/test_config.py
    tests/unit/cache/test_graph.py tests/unit/experiments/test_perplexity.py tests/reference/test_smollm2.py
    tests/reference/test_docs.py"

if [ $# = 0 ]; then
    # "transformers>=A,<B": the newest release of series A, and the newest below B that there is.
    range=$(sed -n 's/^ *"transformers>=\([0-9.]*\),<\([0-9.]*\)",$/\1 \2/p' pyproject.toml)
    set -- "==${range% *}.*" "<${range#* }"
else
    for version in "$@"; do
        shift
        set -- "$@" "==$version"
    done
fi

failed=""
for wanted in "$@"; do
    folder=$scratch/$(echo "$wanted" | tr -c '0-9\n' _)
    tests/compat/overlay.sh "$folder" --upgrade "transformers$wanted"
    version=$("$folder/bin/python" -c 'import transformers; print(transformers.__version__)')
    echo "=== transformers $version"
    # shellcheck disable=SC2086
    OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -q $tests ${PYTEST_ARGS:-} || failed="$failed $version"
done
if [ -n "$failed" ]; then
    echo "failed with transformers$failed" >&2
    exit 1
fi
