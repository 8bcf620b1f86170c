#!/usr/bin/env bash
# Deletes the TPU and its queued resource. What is in the mounted directory stays; the workers' own disks go.
#
#   bash launch/tpu_delete.sh [--config=FILE] [--dry_run]
set -euo pipefail

# shellcheck source=launch/tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
read_command_line "" "$@"
require_tpu

if [[ "$dry_run" == no ]]; then
  state="$(tpu_state)" || exit
  if [[ "$state" == absent ]]; then
    echo "there is no $name in $zone"
    exit
  fi
fi
delete_tpu
