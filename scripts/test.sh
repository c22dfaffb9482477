#!/usr/bin/env bash
# Runs all checks: style, types, tests. Arguments go to pytest: `bash scripts/test.sh -k layouts`.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Two test processes with one thread each beat one process whose tiny matrix products fight over all cores.
export OMP_NUM_THREADS=1

ruff check .
ruff format --check .
mypy
pytest -n 2 "$@"
