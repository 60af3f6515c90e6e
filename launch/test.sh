#!/usr/bin/env bash
# A bare machine to tested code.
#   bash launch/test.sh              the fast tests
#   bash launch/test.sh -m slow      the slow ones (real models, whole runs)
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh .venv-test ".[dev]"
exec .venv-test/bin/python -m pytest -q "$@"
