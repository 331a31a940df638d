#!/usr/bin/env bash
# In each pod of gke.sh: train, and exit with 75 if the run was stopped before it was finished.
#   launch/pod.sh --workdir=gs://BUCKET/DIR|/MOUNTED_DIR [arguments of training]
# gke.sh gives the workdir; a pod's own disk ends with it. --dry-run prints the commands.
# Training that saves on SIGTERM exits with 0, and Kubernetes would count its pod as succeeded. Only
# the pod of process 0 checks whether the run is finished: process 0 writes the summary. Any other
# status is passed on: the JobSet restarts its pods.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/dry_run.sh
source launch/help.sh
source launch/workdir.sh
require_workdir "$@"
export EXTRAS="tpu,gcs${EXTRAS:+,$EXTRAS}" RESTARTS=0
source launch/restarts.sh

code=0
hand_on ./launch/local.sh "$@" ${dry_run:+--dry-run} || code=$?
# If training was killed, another process prints the reason. The end of the pod would kill it first.
[[ $code == 0 ]] || { sleep 1; exit "$code"; }
[[ ${TPU_WORKER_ID:-0} == 0 ]] || exit 0
finished=(.venv/bin/python launch/finished.py "$@")
[[ -n $dry_run ]] || exec "${finished[@]}"
quoted "${finished[@]}"
