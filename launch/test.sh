#!/usr/bin/env bash
# A bare machine to tested code.
#   bash launch/test.sh              the fast tests
#   bash launch/test.sh -m smoke     a quick selection of them
#   bash launch/test.sh -m slow      the slow ones (real models, whole runs)
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh .venv-test ".[dev]"
# Python keeps what it compiles; else every process of a test would compile what it imports.
unset PYTHONDONTWRITEBYTECODE
# Two processes: most of the time goes to compiling, which takes one core.
exec .venv-test/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
