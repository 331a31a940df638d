#!/usr/bin/env bash
# Make .venv if absent, install the package, and train:
#   ./launch/local.sh --config=configs/quickstart.py [--workdir=DIR] [--config.x.y=v]
# The workdir is runs/NAME by default, with the config's NAME. PYTHON chooses the interpreter (3.11
# or newer), EXTRAS the extras, such as EXTRAS=cuda. A run that ends with status 75 (a server or an
# engine failed) is started again, at most RESTARTS times (3) without a new checkpoint. --dry-run
# prints the commands. All other arguments are those of opd_jax.train, whose --help follows here
# once it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/dry_run.sh

source launch/workdir.sh
workdir_in runs "$@"
train=(.venv/bin/python -m opd_jax.train "$@" ${workdir[@]+"${workdir[@]}"})
source launch/help.sh

if [[ -n $dry_run ]]; then
  echo "bash -c 'source launch/venv.sh && ensure_venv \"${EXTRAS:-}\"'"
  quoted "${train[@]}"
  exit
fi
source launch/venv.sh
ensure_venv "${EXTRAS:-}"
[[ ${RESTARTS:-} != 0 ]] || exec "${train[@]}"
source launch/restarts.sh
signalled=""
while true; do
  code=0
  hand_on "${train[@]}" || code=$?
  [[ $code == 75 && -z $signalled ]] && may_restart "${train[@]}" || exit "$code"
done
