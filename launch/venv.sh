# shellcheck shell=bash
# Sourced by the other scripts: `ensure_venv EXTRAS` makes .venv and installs the package with them.

ensure_venv() {
  local extras=$1 target="."
  [[ -n $extras ]] && target=".[$extras]"
  if [[ ! -x .venv/bin/python ]]; then
    local python
    for python in ${PYTHON:-python3.12 python3.11 python3}; do
      # Asked to run, not looked up: a version manager's shim may exist for a Python that does not.
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      python=""
    done
    if [[ -z $python ]]; then
      echo "error: found no Python 3.11 or newer; set PYTHON to its path" >&2
      exit 2
    fi
    "$python" -m venv .venv
  fi
  # Installing takes seconds even when nothing changed, so it is skipped for an unchanged project.
  local stamp=".venv/installed-${extras:-core}"
  if [[ ! -e $stamp || pyproject.toml -nt $stamp ]]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$target"
    touch "$stamp"
  fi
}
