# Sourced by the other scripts: `ensure_venv EXTRAS` makes .venv and installs the package with them.

ensure_venv() {
  local extras=$1 target="."
  [[ -n $extras ]] && target=".[$extras]"
  if [[ ! -x .venv/bin/python ]]; then
    local python=${PYTHON:-$(command -v python3.12 || command -v python3.11 || echo python3)}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: $python is older than Python 3.11; set PYTHON to a newer interpreter" >&2
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
