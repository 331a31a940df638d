#!/usr/bin/env bash
# In each pod of gke.sh: train, and exit with 75 if the run was stopped before it was finished.
#   launch/pod.sh [arguments of training]
# Kubernetes would count a pod that saved on SIGTERM and left with 0 as one that succeeded. Only the
# pod of process 0, which writes the summary, looks whether the run is finished.
set -euo pipefail
cd "$(dirname "$0")/.."
export EXTRAS=tpu

child=""
trap '[[ -z $child ]] || kill -TERM "$child"' TERM
./launch/local.sh "$@" &
child=$!
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before its process
  code=0
  wait "$child" || code=$?
done
# Of a process that was killed another one says the last words, if it is not ended with the pod.
[[ $code == 0 ]] || { sleep 1; exit "$code"; }
if [[ ${TPU_WORKER_ID:-0} == 0 ]]; then
  exec .venv/bin/python launch/finished.py "$@"
fi
