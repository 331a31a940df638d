#!/usr/bin/env bash
# Make .venv if absent, install all that the tests use, and run pytest:
#   ./launch/test.sh              every test that is not slow
#   ./launch/test.sh -m slow      the slow ones
#   ./launch/test.sh -m quick     those to run after every change, in less than 90 s
# Other arguments go to pytest too. ALFWorld's tests need its compilers, ScienceWorld's need Java.
# The viewer's fail without Chromium: sudo apt-get install chromium
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/help.sh
source launch/venv.sh
ensure_test_venv
# Two processes: more need more memory than they save time. Each takes whole files, in the order of
# their names: pytest-xdist's own order puts the slowest files last, with one process idle.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
