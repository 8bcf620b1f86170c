#!/usr/bin/env bash
# Runs a training command as one process of a job on a cluster:
#
#   bash launch/stoppable.sh COMMAND...
#
# The trainer ends with 0 when it is done, and also when SIGTERM made it save and stop. A cluster must tell the two
# apart, or it takes a preempted job for a finished one. So this passes SIGTERM on, and ends with 75 ("try again later",
# EX_TEMPFAIL) instead of 0 after one.
set -euo pipefail

if [[ "$#" == 0 ]]; then
  echo "error: no command; usage: bash launch/stoppable.sh COMMAND..." >&2
  exit 2
fi

signals=0 trainer=""
# shellcheck disable=SC2317 # The trap calls it.
stop() {
  signals=$((signals + 1))
  [[ -z "$trainer" ]] || kill -TERM "$trainer" 2>/dev/null || true
}
trap stop TERM

PYTHONUNBUFFERED=1 "$@" &
trainer=$!
[[ "$signals" == 0 ]] || kill -TERM "$trainer" # It came before there was anyone to pass it on to.
while true; do
  seen="$signals"
  status=0
  wait "$trainer" || status=$?
  # A signal ends `wait` early while the trainer still runs.
  [[ "$signals" == "$seen" ]] && break
done
[[ "$signals" == 0 || "$status" != 0 ]] || status=75
exit "$status"
