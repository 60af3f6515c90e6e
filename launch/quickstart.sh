#!/usr/bin/env bash
# A bare machine to a safer chat model and its report: a virtual environment, the packages, the run.
#   bash launch/quickstart.sh [--config.seed=1 ...]     WORKDIR=runs/other bash launch/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh .venv "."
# Python keeps what it compiles, also where a machine forbids it: a start takes seconds less.
unset PYTHONDONTWRITEBYTECODE
# Large arrays in huge pages, where the kernel leaves that to the program: see docs/PERFORMANCE.md.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec .venv/bin/python -m drirl_jax.main --config configs/quickstart.py --workdir "${WORKDIR:-runs/quickstart}" "$@"
