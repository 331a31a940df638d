# shellcheck shell=bash
# Sourced without arguments: takes --dry-run, wherever it stands, out of the arguments of the script
# and sets `dry_run`.

# shellcheck disable=SC2034 # the script reads it
dry_run="" words=()
for word in "$@"; do
  # shellcheck disable=SC2034
  if [[ $word == --dry-run ]]; then dry_run=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
