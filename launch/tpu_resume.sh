#!/usr/bin/env bash
# Goes on with a run: gets the TPU back if it was preempted, installs, and starts the same command, which continues from
# its newest checkpoint. Does nothing while the run is under way or when it is finished.
#
#   bash launch/tpu_resume.sh [--config=FILE] [--watch] [--dry_run]
#
#   --watch   stays and does so as often as needed (`restarts` in the configuration file) until the run is finished
set -euo pipefail

# shellcheck source=launch/tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
read_command_line --watch "$@"
require_tpu
check_train

start_again() {
  local arguments=("--config=$conf")
  [[ "$dry_run" == no ]] || arguments+=(--dry_run)
  bash "$LAUNCH/tpu_create.sh" "${arguments[@]}" || exit # It has tried for long, or there is no use in trying.
  bash "$LAUNCH/tpu_setup.sh" "${arguments[@]}" && bash "$LAUNCH/tpu_run.sh" "${arguments[@]}"
}

if [[ "$dry_run" == yes ]]; then
  echo "# if it was preempted:"
  delete_tpu
  echo "# if it is not there, or no longer; then in any case:"
  start_again
  exit
fi

# What the workers say together: running, finished, refused (the command is wrong: trying again is no use) or stopped.
run_state() {
  local said
  said="$(on_workers all "bash balcap_jax/launch/tpu_worker.sh status" 2>/dev/null)" || true
  case "$said" in
    *": refused"*) echo refused ;;
    *": running"*) echo running ;; # When some are not, the others end by themselves within a minute.
    *": failed"* | *": stopped"* | *": idle"*) echo stopped ;;
    *": finished"*) echo finished ;;
    *) echo stopped ;;
  esac
}

started=0
while true; do
  tpu="$(tpu_state)" || exit
  run=stopped
  [[ "$tpu" != ready ]] || run="$(run_state)"
  case "$run" in
    finished)
      echo "the run is finished"
      exit
      ;;
    refused) fail "the training command ended with an error of its own; see its log (tpu_run.sh --status names it)" ;;
    stopped)
      [[ "$started" -lt "$restarts" ]] ||
        fail "started $started times and still not finished; see the logs (tpu_run.sh --status names them)"
      started=$((started + 1))
      if ! start_again; then
        given --watch || exit 1
        echo "could not start the run (see above); looking again" # The TPU may have been preempted just now.
      fi
      ;;
  esac
  if ! given --watch; then
    [[ "$run" != running ]] || echo "the run is under way"
    exit
  fi
  sleep "$poll_seconds"
done
