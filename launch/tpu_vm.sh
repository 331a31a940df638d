#!/usr/bin/env bash
# Train on a slice of TPU VMs, by `gcloud compute tpus`, with one process a host:
#   ./launch/tpu_vm.sh create        request the slice, as a queued resource
#   ./launch/tpu_vm.sh sync          stop a run on the hosts (it saves); copy this checkout to them
#   ./launch/tpu_vm.sh run --config=... [--workdir=DIR] [--config.x.y=v]
#       create if needed, wait, sync, train on every host, and show the log of the first; again
#       after each preemption or status 75, until it is finished. Ctrl-C does not stop the training
#   ./launch/tpu_vm.sh status        the slice, and the last line of every host's log
#   ./launch/tpu_vm.sh stop          stop the run (it saves), and delete the slice
# The workdir is TPU_RUNS/NAME by default, with the config's NAME; hosts lose their disks.
# --dry-run prints the commands of a run without preemptions. Settings: launch/env.example.
set -euo pipefail
cd "$(dirname "$0")/.."
verbs=(create sync run status stop)
source launch/remote.sh
require TPU_NAME TPU_PROJECT TPU_ZONE TPU_TYPE TPU_RUNTIME TPU_SPOT TPU_SETUP
one_of TPU_SPOT yes no
where=("--project=$TPU_PROJECT" "--zone=$TPU_ZONE") spot=(--spot) exists=""
[[ $TPU_SPOT == yes ]] || spot=()
worker=opd_jax/launch/worker.sh log=opd_jax/runs/worker.log extras=${EXTRAS:+EXTRAS=$EXTRAS }

tpus() { call gcloud compute tpus "$@"; }
on() { tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"; }
create() {
  tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${where[@]}" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_RUNTIME" ${spot[@]+"${spot[@]}"}
}
delete() { exists="" && tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet; }
list() { # KIND FIELD ANSWER: a dry run prints the command and takes ANSWER for its answer
  retry tpus "$1" list "${where[@]}" --filter="name~/$TPU_NAME\$" --format="value($2)" || return
  [[ -z $dry_run ]] || echo "${exists:+$3}"
}
state() { # of the request, such as WAITING; ACTIVE:STATE, with that of the hosts; "" without one
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
      FAILED) fail "\`$TPU_NAME\` was refused; \`status\` says why, \`stop\` deletes the request" ;;
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
    if sync && on all "$extras$worker start $(quoted "$@")"; then
      on 0 "${RESTARTS:+RESTARTS=$RESTARTS }$worker follow $(quoted "$@")" && return || status=$?
    fi
    [[ $status != 2 ]] || fail "the command has a mistake, named above"
    for _ in {1..10}; do # a preemption shows in the state minutes after it ends the hosts
      [[ $(state) == ACTIVE:READY ]] || continue 2
      sleep 30
    done # 75: the run was stopped, or a host rebooted. 255: ssh lost the connection. Resume
    [[ $status =~ ^(75|255)$ ]] || fail "the run ended with status $status, not by a preemption"
  done
}
case $verb in
  create | sync) "$verb" ;;
  run) workdir_below TPU_RUNS "$@" && run "$@" ${workdir[@]+"${workdir[@]}"} ;;
  status) tpus queued-resources describe "$TPU_NAME" "${where[@]}" && on all "tail -n 1 $log" ;;
  stop) on all "$worker stop" || echo "no run was stopped" >&2; delete ;;
esac
