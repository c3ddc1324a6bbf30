#!/bin/sh
# Build the image where there is no Docker engine: the Dockerfile as it stands, with buildah, which needs neither a
# daemon nor a network of its own here.
#
#   tests/image/build.sh [WORK] [buildah's options, such as --build-arg TORCH_BACKEND=cu130]
#
# Needs root, buildah and debootstrap (apt-get install buildah debootstrap), and about 10 GB in WORK
# (/var/tmp/turboquant-image). The base image is made from Debian's packages under the name that the Dockerfile asks
# for. The Python packages are fetched with this machine's pip, by its configuration; the build itself is cut off from
# the network unless NETWORK=1 (the GPU variant installs a compiler with apt). Prints the name of the image.
set -eu
cd "$(dirname "$0")/../.."
work=${1:-/var/tmp/turboquant-image}
[ $# -eq 0 ] || shift
tag=${TAG:-turboquant:cpu}
base=python:3.11-slim-bookworm
python=${PYTHON:-.venv/bin/python}
mkdir -p "$work/wheels"

store() { buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@"; }

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "the base image has Python 3.11, so its packages must be fetched with Python 3.11: set PYTHON" >&2
    exit 2
}

if ! store inspect --type image "$base" >/dev/null 2>&1; then
    echo "making $base from Debian's packages" >&2
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$work/root" >"$work/debootstrap.log"
    rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/* \
        "$work"/root/usr/lib/python3*/EXTERNALLY-MANAGED
    container=$(store from scratch)
    store add --quiet "$container" "$work/root" / >/dev/null
    store config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
    store commit --quiet --format docker --rm "$container" "$base" >/dev/null
    rm -rf "$work/root"
fi

# What the Dockerfile installs: torch with what it needs, the rest as the lock has it, and what builds hqq (an sdist).
torch=$(sed -n 's/^ARG TORCH=//p' Dockerfile)
uv=$(sed -n 's/.*pip install --no-cache-dir \(uv==[0-9.]*\).*/\1/p' Dockerfile)
wanted="${TORCH:-$torch} $uv $(cksum <requirements.lock)"
if [ "$(cat "$work/wheels/.made-for" 2>/dev/null)" != "$wanted" ]; then
    "$python" -m pip download --quiet --no-deps --require-hashes --dest "$work/wheels" -r requirements.lock
    "$python" -m pip download --quiet --dest "$work/wheels" --find-links "$work/wheels" \
        "torch==${TORCH:-$torch}" "$uv" setuptools wheel
    echo "$wanted" >"$work/wheels/.made-for"
fi

printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"
printf 'offline = true\n[pip]\nfind-links = ["/wheels"]\n' >"$work/uv.toml"

alone="unshare --net"
[ -z "${NETWORK:-}" ] || alone=""
$alone buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs build \
    --isolation chroot --format docker --pull-never --tag "$tag" \
    --volume "$work/wheels:/wheels:ro" \
    --volume "$work/pip.conf:/etc/pip.conf:ro" \
    --volume "$work/uv.toml:/etc/uv/uv.toml:ro" \
    --build-arg COMMIT="$(git describe --always --dirty --abbrev=12 --exclude='*')" \
    "$@" . >&2
echo "$tag"
