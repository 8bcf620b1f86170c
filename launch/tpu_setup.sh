#!/usr/bin/env bash
# Puts this checkout on every worker of the TPU, installs it there, and mounts the directory that runs live in.
#
#   bash launch/tpu_setup.sh [--config=FILE] [--dry_run]
#
# To be repeated after every change of the code; what is installed already is not installed again.
set -euo pipefail

# shellcheck source=launch/tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
read_command_line "" "$@"
require_tpu

archive="${TMPDIR:-/tmp}/balcap_jax-$name.tgz"
run tar -czf "$archive" -C "$(dirname "$LAUNCH")" --exclude=__pycache__ --exclude=tpu.conf \
  balcap_jax configs launch setup.py README.md
copy_or_run scp "$archive" "$name:balcap_jax.tgz" --worker=all
run rm -f "$archive"
# --recursive-unlink: a module that is gone here must not live on there. The environment stands beside what it empties.
unpack="mkdir -p balcap_jax && tar -xzf balcap_jax.tgz -C balcap_jax --recursive-unlink"
arguments=("$mount" "$mount_at" ${setup_command[@]+"${setup_command[@]}"})
on_workers all "$unpack && $(shown bash balcap_jax/launch/tpu_worker.sh setup "${arguments[@]}")"
