#!/usr/bin/env bash
# Make .venv if absent, install the package with its test extra, and run pytest:
#   ./launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/venv.sh
ensure_venv test
exec .venv/bin/python -m pytest "$@"
