#!/usr/bin/env bash
# Train on GPU nodes of a Slurm cluster, with one process a node or one a GPU:
#   ./launch/slurm.sh run --config=... --workdir=/DIR [--config.x.y=v]
#   ./launch/slurm.sh status        the jobs of JOB_NAME
#   ./launch/slurm.sh stop          cancel them; training saves on SIGTERM
# All nodes must mount the checkout and the workdir. `run` installs the package before it submits
# the job, since nodes often have no network. A job that is preempted, loses a node or reaches
# JOB_TIME goes back into the queue and resumes, until the run is finished. So does one that ends
# with status 75, a few times (env.example). Others that fail do not. The log is
# runs/slurm-NUMBER.log. --dry-run prints the commands.
# Settings: launch/env.example.
set -euo pipefail
cd "$(dirname "$0")/.."
verbs=(run status stop)
source launch/remote.sh
require JOB_NAME JOB_PARTITION JOB_NODES JOB_GPUS JOB_PROCESSES JOB_TIME
one_of JOB_PROCESSES node gpu
tasks=1
[[ $JOB_PROCESSES == node ]] || tasks=$JOB_GPUS

case $verb in
  run)
    require_workdir "$@"
    call mkdir -p runs
    call bash -c "source launch/venv.sh && ensure_venv cuda${EXTRAS:+,$EXTRAS}"
    # No --gpus-per-task: JAX picks a process's GPUs, and so must see all of the node. --signal: two
    # minutes before JOB_TIME ends, training gets SIGTERM; slurm_job.sh does not.
    call sbatch --job-name="$JOB_NAME" --partition="$JOB_PARTITION" --time="$JOB_TIME" \
      --nodes="$JOB_NODES" --gpus-per-node="$JOB_GPUS" --ntasks-per-node="$tasks" --exclusive \
      --mem=0 --requeue --signal=TERM@120 --open-mode=append --output=runs/slurm-%j.log \
      launch/slurm_job.sh "$@"
    ;;
  status) call squeue --user="$USER" --name="$JOB_NAME" ;;
  stop) call scancel --user="$USER" --name="$JOB_NAME" ;;
esac
