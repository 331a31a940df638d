# shellcheck shell=bash
# Sourced without arguments: takes --dry-run, wherever it stands, out of the arguments of the script
# and sets `dry_run`. It defines:
#   quoted WORD...   print the words as a shell would read them

# shellcheck disable=SC2034 # the script reads it
dry_run="" words=()
for word in "$@"; do
  # shellcheck disable=SC2034
  if [[ $word == --dry-run ]]; then dry_run=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}

quoted() {
  local word line="" quote="'\\''" # no ${word@Q}: a Mac's bash is 3.2
  for word in "$@"; do # plain words are easier to read
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$quote}'"
    line+=" $word"
  done
  echo "${line# }"
}
