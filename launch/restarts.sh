# shellcheck shell=bash
# Sourced by local.sh, pod.sh, worker.sh and slurm_job.sh. Training ends with status 75 if a server,
# an engine or another process failed (opd_jax/runtime/exits.py), and the same command resumes it.
#   hand_on COMMAND...      run it, hand it the signals, and return its status
#   may_restart ARGUMENT... count a status 75 of the training with these arguments; fail, with a
#                           line, at the one after RESTARTS (3) of them without a new checkpoint

hand_on() {
  local child name
  set -m # without job control a process in the background ignores Ctrl-C
  "$@" &
  child=$!
  set +m
  for name in INT TERM HUP; do
    # shellcheck disable=SC2064 # the child of now
    trap "signalled=$name; kill -$name $child 2>/dev/null || true" "$name"
  done
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the process ends
    wait "$child" || true
  done
  wait "$child"
}

saved() { # names of the complete checkpoints below a workdir; a comparison's are in METHOD/seed-N
  local names
  if [[ $1 == gs://* ]]; then
    names=$(.venv/bin/python -c 'import sys; from opd_jax.runtime import bucket
print(*bucket.names(bucket.place(sys.argv[1], name="--workdir", is_new=True)), sep="\n")' "$1" \
      2>/dev/null) || return # the bucket is away
    grep "/commit_success.txt$" <<<"$names" | sort || true
  else # a save that was killed leaves a longer name
    find "$1/" -maxdepth 4 -path "*/checkpoints/*" -name "[0-9]*" ! -name "*[!0-9]*" 2>/dev/null |
      sort || true
  fi
}

may_restart() {
  local word previous="" workdir="" file names now before=none count=0
  for word in "$@"; do
    [[ $word != --workdir=* ]] || workdir=${word#--workdir=}
    [[ $previous != --workdir ]] || workdir=$word
    previous=$word
  done
  workdir=${workdir/#\~/${HOME-}} # as the training reads it
  file=$workdir/restarts
  [[ $workdir != gs://* ]] || file=runs/restarts-$(cksum <<<"$workdir" | cut -d" " -f1)
  [[ ! -f $file ]] || read -r before count <"$file"
  now=$before # where they cannot be seen
  ! names=$(saved "$workdir") || now=$(cksum <<<"$names" | cut -d" " -f1)
  [[ $before == "$now" ]] || count=0
  if ((count >= ${RESTARTS:-3})); then
    rm -f "$file"
    echo "error: status 75 again after $count restarts without a new checkpoint in $workdir" >&2
    return 1
  fi
  mkdir -p "$(dirname "$file")"
  echo "$now $((count + 1))" >"$file"
}
