#!/usr/bin/env bash
# Make .venv if absent, install the package, and train:
#   ./launch/local.sh --config=configs/quickstart.py [--workdir=DIR] [--config.x.y=v]
# The workdir is runs/NAME by default, with the config's NAME. PYTHON chooses the interpreter (3.11
# or newer), EXTRAS the extras, such as EXTRAS=cuda. --dry-run prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/dry_run.sh

workdir=()
if [[ " $* " != *" --workdir"* && " $* " != *" --help"* ]]; then
  config="" previous=""
  for word in "$@"; do
    [[ $word == --config=* ]] && config=${word#--config=}
    [[ $previous == --config ]] && config=$word
    previous=$word
  done
  name=$(basename "$config" | sed -e 's/\.py//' -e 's/[^A-Za-z0-9_.=-]/-/g')
  workdir=(--workdir="runs/${name:-run}")
fi
train=(.venv/bin/python -m opd_jax.train "$@" ${workdir[@]+"${workdir[@]}"})

if [[ -n $dry_run ]]; then
  echo "bash -c 'source launch/venv.sh && ensure_venv \"${EXTRAS:-}\"'"
  line=$(printf ' %q' "${train[@]}")
  echo "${line# }"
  exit
fi
source launch/venv.sh
ensure_venv "${EXTRAS:-}"
exec "${train[@]}"
