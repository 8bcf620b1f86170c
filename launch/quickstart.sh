#!/usr/bin/env bash
# From a clean clone to a trained captioner and its report, on one machine.
#
#   bash launch/quickstart.sh [WORKDIR] [--config.FIELD=VALUE ...]
#
# WORKDIR is runs/quickstart unless given; everything after it goes to `python -m balcap_jax.train`. The same command
# resumes a run that was stopped, and shows the table of one that is finished.
set -euo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi

workdir=""
if [[ $# -gt 0 && "$1" != -* ]]; then
  # Relative to where the caller stands, not to the repository.
  case "$1" in
    /* | gs://*) workdir="$1" ;;
    *) workdir="$PWD/$1" ;;
  esac
  shift
fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
workdir="${workdir:-$ROOT/runs/quickstart}"

prepare_environment base

# The trainer saves and ends in good order on SIGTERM. The shell would not pass the signal on to a program in the
# foreground, so the program runs beside it. Ctrl-C asks for the same; a second one ends the trainer at once.
signals=0
exec 3>&2
stop() {
  signals=$((signals + 1))
  if [[ "$signals" == 1 ]]; then
    echo "stopping after this step (once more: stop at once)" >&3
    kill -TERM "$trainer" 2>/dev/null || true
  else
    kill -KILL "$trainer" 2>/dev/null || true
  fi
}

PYTHONUNBUFFERED=1 "$VENV_PYTHON" -m balcap_jax.train --config=configs/scenes.py --workdir="$workdir" "$@" &
trainer=$!
trap stop TERM INT
while true; do
  seen="$signals"
  status=0
  # Quiet, or the shell would report "Killed" with a line of this script after the second Ctrl-C.
  { wait "$trainer" || status=$?; } 2>/dev/null
  # A signal ends `wait` early while the trainer still runs.
  [[ "$signals" == "$seen" ]] && break
done

elapsed="$((SECONDS / 60)) min $((SECONDS % 60)) s"
if [[ "$status" != 0 ]]; then
  echo "quickstart: training ended with status $status after $elapsed; workdir: $workdir" >&2
  exit "$status"
fi
if [[ "$signals" != 0 ]]; then
  echo "quickstart: stopped after $elapsed; the same command goes on from there"
elif [[ -f "$workdir/report.html" || "$workdir" == gs://* ]]; then
  echo "quickstart: done in $elapsed"
fi
if [[ -f "$workdir/report.html" ]]; then
  echo "report: $workdir/report.html"
fi
