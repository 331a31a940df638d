#!/usr/bin/env bash
# A slice of TPU VMs by `gcloud compute tpus`, one process a host:
#   ./launch/tpu_vm.sh create        ask for the slice: a queued resource
#   ./launch/tpu_vm.sh sync          copy this checkout to every host; ends a run there, which saves
#   ./launch/tpu_vm.sh run --config=... --workdir=/DIR [--config.x.y=v]
#       create if need be, wait, sync, train on every host, show the log of the first; all of it
#       again after a preemption, until the run is finished. Ctrl-C ends only the showing
#   ./launch/tpu_vm.sh status        the slice, and the last line of every host's log
#   ./launch/tpu_vm.sh stop          end the run, which saves, and delete the slice
# --dry-run prints the commands of an undisturbed course. Settings: launch/env.example. Hosts go
# with all that they hold: the workdir must be on a file system that TPU_SETUP mounts.
set -euo pipefail
cd "$(dirname "$0")/.."
verbs=(create sync run status stop)
source launch/remote.sh
require TPU_NAME TPU_PROJECT TPU_ZONE TPU_TYPE TPU_RUNTIME TPU_SPOT TPU_SETUP
one_of TPU_SPOT yes no
where=("--project=$TPU_PROJECT" "--zone=$TPU_ZONE") spot=(--spot) exists=""
[[ $TPU_SPOT == yes ]] || spot=()
worker=opd_jax/launch/worker.sh log=opd_jax/runs/worker.log

tpus() { call gcloud compute tpus "$@"; }
on() { tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"; }
create() {
  tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${where[@]}" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_RUNTIME" ${spot[@]+"${spot[@]}"}
}
delete() { exists="" && tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet; }
list() { # KIND FIELD, and what a dry run takes for the answer
  retry tpus "$1" list "${where[@]}" --filter="name~/$TPU_NAME\$" --format="value($2)" || return
  [[ -z $dry_run ]] || echo "${exists:+$3}"
}
state() { # of the request, and after a colon of the hosts if it is ACTIVE; empty if there is none
  local found
  found=$(list queued-resources state.state ACTIVE) || return
  [[ $found != ACTIVE ]] || found+=:$(list tpu-vm state READY) || return
  echo "$found"
}
make_ready() {
  local now
  until now=$(state) || exit; [[ $now == ACTIVE:READY ]]; do
    [[ -n $now || -z $exists ]] || fail "\`$TPU_NAME\` was deleted before the run was finished"
    case $now in
      "") exists=1 && create ;;
      SUSPENDED | ACTIVE:PREEMPTED | ACTIVE:TERMINATED) delete ;;
      FAILED) fail "\`$TPU_NAME\` was refused: see \`status\`; \`stop\` deletes the request" ;;
      *) echo "$TPU_NAME is $now" >&2 && exists=1 && sleep 60 ;;
    esac
  done
  exists=1
}
sync() {
  call mkdir -p build && call tar -czf build/opd_jax.tar.gz --exclude={__pycache__,launch/env} \
    opd_jax configs launch pyproject.toml README.md LICENSE &&
    tpus tpu-vm scp build/opd_jax.tar.gz "$TPU_NAME:" "${where[@]}" --worker=all &&
    on all "if [ -e $worker ]; then $worker stop; fi && mkdir -p opd_jax && tar -xzf \
opd_jax.tar.gz -C opd_jax --recursive-unlink" && on all "$TPU_SETUP"
}
run() {
  local status
  while true; do
    make_ready
    status=1
    if sync && on all "$worker start $(quoted "$@")"; then
      on 0 "$worker follow $(quoted "$@")" && return || status=$?
    fi
    [[ $status != 2 ]] || fail "a mistake in the command: see above"
    for _ in {1..10}; do # hosts know of a preemption minutes before their state says so
      [[ $(state) == ACTIVE:READY ]] || continue 2
      sleep 30
    done # 75: stopped, or a host started anew; 255: the connection is lost; training resumes
    [[ $status =~ ^(75|255)$ ]] || fail "it ended with status $status, and was not preempted"
  done
}
case $verb in
  create | sync) "$verb" ;;
  run) require_workdir "$@"; run "$@" ;;
  status) tpus queued-resources describe "$TPU_NAME" "${where[@]}" && on all "tail -n 1 $log" ;;
  stop) on all "$worker stop" || echo "no run was ended" >&2; delete ;;
esac
