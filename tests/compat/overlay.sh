#!/bin/sh
# overlay.sh FOLDER REQUIREMENT...: make a virtual environment in FOLDER that sees the packages of another one and holds
# the requirements above them, so that other versions can be tried without installing PyTorch again or touching .venv.
# PYTHON names the other environment's interpreter.
set -eu
folder=$1
shift
python=${PYTHON:-.venv/bin/python}

"$python" -m venv "$folder"
below=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# addsitedir also reads the .pth files there, such as that of an editable install; its packages come after this one's.
echo "import site; site.addsitedir('$below')" >"$own/zz-below.pth"
# What is there is found and kept; pip leaves alone what lies outside FOLDER and puts other versions in front of it.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
