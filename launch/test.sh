#!/usr/bin/env bash
# Makes the environment and checks everything: ruff, formatting, pytest.
#
#   bash launch/test.sh [PYTEST ARGUMENTS ...]        for example: bash launch/test.sh tests/method -k gate
set -euo pipefail

# Read by tests/conftest.py, which prints the whole time taken above pytest's closing line.
LAUNCH_TEST_STARTED="$(date +%s)"
export LAUNCH_TEST_STARTED

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
prepare_environment dev

# A finding of ruff does not hide what the tests have to say; it still fails the whole.
lint=0
"$VENV_PYTHON" -m ruff check . || lint=1
"$VENV_PYTHON" -m ruff format --check . || lint=1
export LAUNCH_TEST_LINT="$lint"

tests=0
# A file's tests stay in one process, with their fixtures. Compiling takes one core mostly, so two processes hardly disturb
# each other; each takes up to 5 GB, hence no more than four. Files run as they are sorted, the short ones last: by the number
# of their tests, as xdist has it, the few tests that take a minute each would be left to the end, with one process waiting.
"$VENV_PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" || tests=$?
[[ "$tests" == 0 ]] || exit "$tests"
exit "$lint"
