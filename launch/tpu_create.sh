#!/usr/bin/env bash
# Gets a TPU: makes it, or waits for one that is being made, or replaces one that was preempted. What exists stays.
#
#   bash launch/tpu_create.sh [--config=FILE] [--dry_run]
#
# Lack of capacity is tried again with growing pauses; any other refusal ends at once. Afterwards: tpu_setup.sh.
set -euo pipefail

# shellcheck source=launch/tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
read_command_line "" "$@"
require_keys accelerator runtime
require_tpu
[[ "$queue$provisioning" != yespreemptible ]] ||
  fail "$conf: queued resources know spot, not preemptible; set provisioning = spot"

# "on-demand" has no flag.
tier=()
[[ "$provisioning" == on-demand ]] || tier=("--$provisioning")

request_tpu() {
  if [[ "$queue" == yes ]]; then
    tpu queued-resources create "$name" "--node-id=$name" \
      "--accelerator-type=$accelerator" "--runtime-version=$runtime" \
      "--valid-until-duration=${wait_minutes}m" ${tier[@]+"${tier[@]}"} ${create_flag[@]+"${create_flag[@]}"}
  else
    tpu tpu-vm create "$name" "--accelerator-type=$accelerator" "--version=$runtime" \
      ${tier[@]+"${tier[@]}"} ${create_flag[@]+"${create_flag[@]}"}
  fi
}

if [[ "$dry_run" == yes ]]; then
  request_tpu
  exit
fi

errors="$(mktemp)"
trap 'rm -f "$errors"' EXIT
attempt=0 pause="$backoff" deadline=$((SECONDS + wait_minutes * 60))
while true; do
  state="$(tpu_state)" || exit
  case "$state" in
    ready)
      echo "$name is ready"
      exit
      ;;
    pending)
      [[ "$SECONDS" -lt "$deadline" ]] ||
        fail "$name is still not there after $wait_minutes minutes; run this again to go on waiting, or tpu_delete.sh"
      echo "waiting for $name"
      sleep "$poll_seconds"
      continue
      ;;
    lost)
      echo "$name is preempted, failed or stopped; deleting what is left of it"
      delete_tpu
      ;;
  esac
  # The first request comes at once; those after a failure, or for one that failed in the queue, after a pause.
  if [[ "$attempt" -gt 0 ]]; then
    echo "attempt $attempt of $attempts got no TPU; the next one in $pause s"
    sleep "$pause"
    pause=$((pause * 2 < 600 ? pause * 2 : 600))
  fi
  attempt=$((attempt + 1))
  [[ "$attempt" -le "$attempts" ]] ||
    fail "no TPU after $attempts attempts; run this again later, or change zone or provisioning in $conf"
  if ! request_tpu 2>&1 | tee "$errors"; then
    passing "$(<"$errors")" || fail "gcloud refused to make $name (see above)"
  fi
done
