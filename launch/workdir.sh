# shellcheck shell=bash
# Sourced by local.sh, pod.sh and remote.sh.
#   workdir_in PLACE ARG...   set `workdir` to --workdir=PLACE/NAME, with the NAME of the config in
#                             the arguments of training; to () if they have a --workdir
#   value_of NAME ARG...      print what they give as --NAME=VALUE or --NAME VALUE; "" if nothing
#   require_workdir ARG...    fail unless they have one that all machines of a run see

value_of() {
  local word previous="" value=""
  for word in "${@:2}"; do
    [[ $word != "--$1="* ]] || value=${word#*=}
    [[ $previous != "--$1" ]] || value=$word
    previous=$word
  done
  echo "$value"
}

workdir_in() {
  local config name
  workdir=()
  [[ " $* " != *" --workdir"* ]] || return 0
  config=$(value_of config "${@:2}")
  name=$(basename "$config" | sed -e 's/\.py//' -e 's/[^A-Za-z0-9_.=-]/-/g')
  # shellcheck disable=SC2034 # the script reads it
  workdir=(--workdir="$1/${name:-run}")
}

require_workdir() {
  local given
  given=$(value_of workdir "$@")
  [[ $given != @(/|gs://)* ]] || return 0
  echo "error: expected \`--workdir=gs://BUCKET/DIR\`, or a /DIR that all machines of the run" \
    "mount, got ${given:+\`}${given:-none}${given:+\`}" >&2
  exit 2
}
