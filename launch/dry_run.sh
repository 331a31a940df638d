# shellcheck shell=bash
# Sourced, without arguments of its own: takes --dry-run, anywhere among those of the script, out of
# them, and sets `dry_run`.

# shellcheck disable=SC2034 # the script's
dry_run="" words=()
for word in "$@"; do
  # shellcheck disable=SC2034
  if [[ $word == --dry-run ]]; then dry_run=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
