#!/usr/bin/env bash
# On a host of a TPU slice, called by tpu_vm.sh: training that outlives the connection.
#   launch/worker.sh start [arguments of training]    end what runs here, train in the background
#   launch/worker.sh follow [the same arguments]      show the log; exit as the run did, and with 75
#                                                     if it was stopped before it was finished
#   launch/worker.sh stop                             SIGTERM, which saves; in five minutes SIGKILL
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs
pid=runs/worker.pid log=runs/worker.log status=runs/worker.status

running() { # by its folder: after a restart of the host its number may be somebody else's
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
  ./launch/local.sh "$@" &
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
    export OPD_JAX_DISTRIBUTED=auto EXTRAS=tpu
    trap '' HUP
    train "$@" >"$log" 2>&1 </dev/null &
    until [[ -s $pid ]]; do sleep 0.1; done
    ;;
  follow)
    if running; then tail -n 1000 --pid="$(<"$pid")" -F "$log"; else tail -n 1000 "$log"; fi
    for _ in {1..50}; do [[ -s $status ]] || sleep 0.1; done
    [[ -s $status ]] || exit 75 # gone without a word, as with its host
    code=$(<"$status")
    [[ $code == 0 ]] || exit "$code"
    exec .venv/bin/python launch/finished.py "$@"
    ;;
  *) echo "error: expected start, follow or stop, got \`$verb\`" >&2; exit 2 ;;
esac
