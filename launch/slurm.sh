#!/usr/bin/env bash
# GPU nodes of a Slurm cluster, one process a node or one a GPU:
#   ./launch/slurm.sh run --config=... --workdir=/DIR [--config.x.y=v]
#   ./launch/slurm.sh status        the jobs of JOB_NAME
#   ./launch/slurm.sh stop          cancel them; training saves on SIGTERM
# The checkout and the workdir must be on a file system that all nodes mount. The package is
# installed here, before the job is submitted, since nodes often have no network. A job that is
# preempted, loses a node or reaches JOB_TIME goes back into the queue and resumes, until the run is
# finished; one whose training fails does not. Its log is runs/slurm-NUMBER.log. --dry-run prints
# the commands. Settings: launch/env.example.
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
    call bash -c 'source launch/venv.sh && ensure_venv cuda'
    # Without --gpus-per-task: every process is to see all GPUs of its node, and JAX picks. TERM two
    # minutes before the end of JOB_TIME goes to training, not to slurm_job.sh.
    call sbatch --job-name="$JOB_NAME" --partition="$JOB_PARTITION" --time="$JOB_TIME" \
      --nodes="$JOB_NODES" --gpus-per-node="$JOB_GPUS" --ntasks-per-node="$tasks" --exclusive \
      --mem=0 --requeue --signal=TERM@120 --open-mode=append --output=runs/slurm-%j.log \
      launch/slurm_job.sh "$@"
    ;;
  status) call squeue --user="$USER" --name="$JOB_NAME" ;;
  stop) call scancel --user="$USER" --name="$JOB_NAME" ;;
esac
