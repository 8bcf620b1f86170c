# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv in the repository root and installs the project into it, once.
#
#   prepare_environment base   what training, captioning and reporting need
#   prepare_environment dev    and what the tests need
#
# Afterwards VENV_PYTHON is the interpreter to run. PYTHON=/path/to/python chooses the one .venv is made from.
# The files under .venv that say how far it got:
#   installing            holds the id of the process that installs; left behind only by an interrupted installation
#   installed-{base,dev}  written after success: what was installed. While it still fits, pip is not called, so that a
#                         second run starts at once and needs no network.

# Byte code is written at the first import and read at each start. Containers often forbid it (PYTHONDONTWRITEBYTECODE),
# and pip is told below not to make it: every start would compile thousands of modules again.
export PYTHONDONTWRITEBYTECODE=

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"

fail() {
  echo "error: $*" >&2
  exit 2
}

# True if $1 runs and is new enough. A command on PATH need not run: version managers leave stubs that only complain.
new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate without_venv=""
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
    if new_enough "$candidate"; then
      if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        echo "$candidate"
        return
      fi
      without_venv="$candidate"
    fi
    if [[ "$candidate" == "${PYTHON:-}" ]]; then
      fail "PYTHON=$PYTHON does not run, is older than Python 3.11, or lacks the venv module"
    fi
  done
  if [[ -n "$without_venv" ]]; then
    fail "$without_venv lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv)"
  fi
  fail "no Python 3.11 or newer on PATH; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# What an installation depends on. The path is part of it: .venv points at this checkout and does not move with it.
fingerprint() {
  echo "$("$VENV_PYTHON" -V) $ROOT $(cksum <"$ROOT/setup.py")"
}

is_installed() {
  local stamp="$VENV/installed-$1"
  [[ -f "$stamp" && "$(<"$stamp")" == "$(fingerprint)" ]]
}

prepare_environment() {
  local extra="$1" python installer
  [[ -f "$ROOT/setup.py" ]] || fail "$ROOT is not the repository (no setup.py): this script runs in a clone of it"
  if [[ -f "$VENV/installing" ]]; then
    installer="$(<"$VENV/installing")"
    if [[ -n "$installer" ]] && kill -0 "$installer" 2>/dev/null; then
      fail "process $installer is installing into $VENV; wait until it is done"
    fi
    echo "the last installation was interrupted; making .venv again"
    rm -rf "$VENV"
  elif [[ -e "$VENV" ]] && ! new_enough "$VENV_PYTHON"; then
    echo ".venv has no working Python 3.11 or newer; making it again"
    rm -rf "$VENV"
  fi
  if [[ -e "$VENV" ]] && is_installed "$extra"; then
    return
  fi

  python=""
  if [[ ! -e "$VENV_PYTHON" ]]; then
    python="$(find_python)"
    mkdir -p "$VENV"
  fi
  echo "$$" >"$VENV/installing"
  if [[ -n "$python" ]]; then
    echo "making .venv with $("$python" -V)"
    "$python" -m venv "$VENV" || fail "$python could not make $VENV (see above)"
  fi
  echo "installing the project and its dependencies into .venv (first run only, a minute or two) ..."
  local target="$ROOT"
  [[ "$extra" == base ]] || target="${ROOT}[$extra]"
  # --no-compile: pip would make byte code of all that it installs, of which a tenth is ever imported, in half of the
  # time of the whole installation.
  if ! "$VENV_PYTHON" -m pip install -qq --disable-pip-version-check --no-compile --editable "$target"; then
    # pip ended in good order, so what it did install is whole: keep it, and only try again next time.
    rm -f "$VENV/installing"
    fail "the installation failed (see above); run the same command again when the cause is mended"
  fi
  fingerprint >"$VENV/installed-base"
  if [[ "$extra" != base ]]; then
    fingerprint >"$VENV/installed-$extra"
  fi
  rm -f "$VENV/installing"
  echo "installed in $SECONDS s"
}
