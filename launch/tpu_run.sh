#!/usr/bin/env bash
# Starts the training command of the configuration file on all workers of the TPU. It goes on when this ends.
#
#   bash launch/tpu_run.sh [--config=FILE] [--attach | --status | --stop] [--dry_run]
#
#   --attach   also shows the log of worker 0 until the run ends; Ctrl-C ends only the showing
#   --status   starts nothing: says of each worker what it is doing and where its log is
#   --stop     starts nothing: has the run saved and ended
set -euo pipefail

# shellcheck source=launch/tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
read_command_line "--attach --status --stop" "$@"
require_tpu

worker="bash balcap_jax/launch/tpu_worker.sh"
if given --status; then
  on_workers all "$worker status"
  exit
elif given --stop; then
  on_workers all "$worker stop"
  exit
fi
check_train
# BALCAP_DISTRIBUTED: every worker finds the others through the TPU's metadata.
on_workers all "$worker start $(shown "$log_dir" BALCAP_DISTRIBUTED=1 ${env[@]+"${env[@]}"} -- "${train[@]}")"
if given --attach; then
  on_workers 0 "$worker follow"
fi
