# shellcheck shell=bash
# Sourced by local.sh, pod.sh and remote.sh.
#   workdir_in PLACE ARG...   set `workdir` to --workdir=PLACE/NAME, with the NAME of the config in
#                             the arguments of training; to () if they have a --workdir
#   require_workdir ARG...    fail unless they have one that all machines of a run see

workdir_in() {
  local word config="" previous="" name
  workdir=()
  [[ " $* " != *" --workdir"* ]] || return 0
  for word in "${@:2}"; do
    [[ $word == --config=* ]] && config=${word#--config=}
    [[ $previous == --config ]] && config=$word
    previous=$word
  done
  name=$(basename "$config" | sed -e 's/\.py//' -e 's/[^A-Za-z0-9_.=-]/-/g')
  # shellcheck disable=SC2034 # the script reads it
  workdir=(--workdir="$1/${name:-run}")
}

require_workdir() {
  local word previous="" given=""
  for word in "$@"; do
    [[ $word != --workdir=* ]] || given=${word#*=}
    [[ $previous != --workdir ]] || given=$word
    previous=$word
  done
  [[ $given != @(/|gs://)* ]] || return 0
  echo "error: expected \`--workdir=gs://BUCKET/DIR\`, or a /DIR that all machines of the run" \
    "mount, got ${given:+\`}${given:-none}${given:+\`}" >&2
  exit 2
}
