# shellcheck shell=bash
# Sourced by tpu_vm.sh, gke.sh and slurm.sh, which set `verbs`. It answers --help, exports the
# variables of launch/env unless the environment has them, takes --dry-run out of the arguments, and
# takes the first argument, one of `verbs`, as `verb`. It defines:
#   require NAME...      fail if one of these variables is not set
#   one_of NAME VALUE... fail if the variable has none of these values
#   workdir_below NAME ARG...  set `workdir` to --workdir=$NAME/..., if ARGs lack a --workdir
#   call COMMAND...      run a command; in a dry run print it as a shell would read it
#   retry COMMAND...     run a command until it succeeds, ten times at most

source launch/help.sh
if [[ -f launch/env ]]; then
  given=$(export -p)
  set -a
  # shellcheck source=/dev/null
  source launch/env
  set +a
  eval "$given"
fi

source launch/dry_run.sh
source launch/workdir.sh
exec 3>&1 # `call` prints here, also inside $(...)

fail() {
  echo "error: $1" >&2
  exit 2
}

verb=${1:-}
# shellcheck disable=SC2154 # the caller sets `verbs`
[[ -n $verb && " ${verbs[*]} " == *" $verb "* ]] ||
  fail "expected one of ${verbs[*]} first, got \`$verb\`"
shift

require() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] ||
      fail "\`$name\` is not set; set it in launch/env, a copy of launch/env.example"
  done
}

one_of() {
  [[ " ${*:2} " == *" ${!1} "* ]] || fail "\`$1\` must be one of ${*:2}, got \`${!1}\`"
}

workdir_below() {
  workdir_in "${!1:+${!1%/}}" "${@:2}"
  [[ -z ${workdir[*]-} ]] || require "$1"
  [[ -z ${workdir[*]-} || ${!1} == @(/|gs://)?* ]] ||
    fail "\`$1\` must be gs://BUCKET/DIR or a /DIR, got \`${!1}\`"
  require_workdir "${@:2}" ${workdir[@]+"${workdir[@]}"}
}

call() {
  if [[ -n $dry_run ]]; then quoted "$@" >&3; else "$@"; fi
}

retry() {
  for _ in {1..10}; do
    "$@" && return
    sleep 30
  done
  return 1
}
