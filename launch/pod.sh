#!/usr/bin/env bash
# In each pod of gke.sh: train, and exit with 75 if the run was stopped before it was finished.
#   launch/pod.sh [arguments of training]
# Training that saves on SIGTERM exits with 0, and Kubernetes would count its pod as succeeded. Only
# the pod of process 0 checks whether the run is finished: process 0 writes the summary.
set -euo pipefail
cd "$(dirname "$0")/.."
export EXTRAS=tpu

child=""
trap '[[ -z $child ]] || kill -TERM "$child"' TERM
./launch/local.sh "$@" &
child=$!
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the process ends
  code=0
  wait "$child" || code=$?
done
# If training was killed, another process prints the reason. The end of the pod would kill it first.
[[ $code == 0 ]] || { sleep 1; exit "$code"; }
if [[ ${TPU_WORKER_ID:-0} == 0 ]]; then
  exec .venv/bin/python launch/finished.py "$@"
fi
