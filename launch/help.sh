# shellcheck shell=bash
# Sourced without arguments. If the script has --help or -h among its own, prints the comment that
# it begins with, and exits. local.sh sets `train`: that command's help follows, if it is installed.

for word in "$@"; do
  [[ $word == --help || $word == -h ]] || continue
  sed -n '2,/^set /s/^# \{0,1\}//p' "launch/$(basename "$0")"
  [[ -x ${train:-} ]] || exit 0
  echo && exec "${train[@]}"
done
