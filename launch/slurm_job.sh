#!/usr/bin/env bash
# The job that slurm.sh submits: train on all its nodes, and go back into the queue if the run was
# stopped before it was finished, or ended with status 75 (`restarts.sh`).
#   launch/slurm_job.sh [arguments of training]
# Slurm runs a copy of this file, in the folder of the sbatch command.
set -euo pipefail
source launch/restarts.sh
export EXTRAS="cuda${EXTRAS:+,$EXTRAS}" OPD_JAX_DISTRIBUTED=auto

task=(./launch/local.sh)
if [[ $SLURM_NTASKS == "$SLURM_JOB_NUM_NODES" ]]; then
  # JAX gives each Slurm task one GPU. With one process a node, name all GPUs of the node.
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  OPD_JAX_DISTRIBUTED=${hosts[0]}:$((61440 + SLURM_JOB_ID % 4096)) # a port of this job's own
  # shellcheck disable=SC2016 # each task expands its own number
  add='OPD_JAX_DISTRIBUTED+=,$SLURM_PROCID,$SLURM_NTASKS'
  task=(bash -c "$add; exec ./launch/local.sh \"\$@\"" task)
fi
code=0 again=""
RESTARTS=0 srun --kill-on-bad-exit=1 --cpu-bind=none "${task[@]}" "$@" || code=$?
if [[ $code == 0 ]]; then
  .venv/bin/python launch/finished.py "$@" || code=$?
  [[ $code != 75 ]] || again=1
elif [[ $code == 75 ]] && may_restart "$@"; then
  again=1
fi
# A cancelled job saves and gets here too, but its state is no longer RUNNING.
if [[ -n $again && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
