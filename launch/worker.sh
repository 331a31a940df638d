#!/usr/bin/env bash
# On a host of a TPU slice, called by tpu_vm.sh: train in the background, without the connection.
#   launch/worker.sh start [arguments of training]    stop what runs here, then start
#   launch/worker.sh follow [the same arguments]      show the log; exit with the run's status, with
#                                                     75 if it was stopped before it finished, or
#                                                     with 1 if 75 was its status too often
#   launch/worker.sh stop                             SIGTERM (it saves); SIGKILL in five minutes
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs
pid=runs/worker.pid log=runs/worker.log status=runs/worker.status

running() { # checks its folder too: after a reboot another process may have its number
  [[ -s $pid && /proc/$(<"$pid")/cwd -ef . ]]
}
stop() {
  local round
  for round in {1..60}; do
    running || return 0
    kill -TERM "$(<"$pid")" 2>/dev/null || true
    sleep 5
  done
  echo "error: process $(<"$pid") did not end within $round rounds of 5 s; killing it" >&2
  kill -KILL "$(<"$pid")"
}
train() {
  local code=0
  RESTARTS=0 ./launch/local.sh "$@" &
  echo $! >"$pid"
  wait $! || code=$?
  echo "$code" >"$status"
}

verb=${1:-}
shift || true
case $verb in
  stop) stop ;;
  start)
    stop
    rm -f "$pid" "$status"
    export OPD_JAX_DISTRIBUTED=auto EXTRAS="tpu,gcs${EXTRAS:+,$EXTRAS}"
    trap '' HUP
    train "$@" >"$log" 2>&1 </dev/null &
    until [[ -s $pid ]]; do sleep 0.1; done
    ;;
  follow)
    if running; then tail -n 1000 --pid="$(<"$pid")" -F "$log"; else tail -n 1000 "$log"; fi
    for _ in {1..50}; do [[ -s $status ]] || sleep 0.1; done
    [[ -s $status ]] || exit 75 # no status: the host rebooted
    code=$(<"$status")
    source launch/restarts.sh
    [[ $code != 75 ]] || may_restart "$@" || exit 1
    [[ $code == 0 ]] || exit "$code"
    exec .venv/bin/python launch/finished.py "$@"
    ;;
  *) echo "error: expected start, follow or stop, got \`$verb\`" >&2; exit 2 ;;
esac
