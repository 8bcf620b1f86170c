#!/usr/bin/env bash
# What the tpu_*.sh scripts have every worker of a TPU do; it is copied there by tpu_setup.sh.
#
#   bash balcap_jax/launch/tpu_worker.sh setup MOUNT DIRECTORY [COMMAND ...]
#   bash balcap_jax/launch/tpu_worker.sh start LOG_DIRECTORY VARIABLE=VALUE ... -- ARGUMENTS of balcap_jax.train ...
#   bash balcap_jax/launch/tpu_worker.sh status | stop | follow
#   (and `job`, which `start` leaves running)
#
# ~/balcap_job holds pid, log (a link to it) and status, which is written when the process ends.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
JOB="$HOME/balcap_job"

mount_nfs() {
  local address="${1%%/*}" export="/${1#*/}"
  command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common
  # nolock: the server would keep the lock of a preempted machine for good. The last two: what one worker made, the
  # others see within a second.
  sudo mount -t nfs -o vers=3,hard,nolock,actimeo=1,lookupcache=positive "$address:$export" "$2"
  sudo chmod 1777 "$2"
}

mount_bucket() {
  command -v gcsfuse >/dev/null ||
    fail "gcsfuse is not installed on $(hostname); install it by lines setup_command = ... in the configuration file"
  sudo chown "$(id -u):$(id -g)" "$2"
  # Every worker must see at once what another one made, so nothing is remembered. Checkpoints are made under another
  # name and renamed: in a bucket with hierarchical namespace that is one step, in another one it needs the limit.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 \
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$2"
}

setup() {
  local kind="$1" directory="$2" command
  shift 2
  for command in "$@"; do
    bash -c "$command" || fail "on $(hostname): '$command' failed (see above)"
  done
  if [[ "$kind" != none ]] && ! mountpoint -q "$directory"; then
    sudo mkdir -p "$directory"
    case "$kind" in
      nfs://*) mount_nfs "${kind#nfs://}" "$directory" ;;
      gs://*) mount_bucket "${kind#gs://}" "$directory" ;;
    esac
  fi
  # The images of TPU VMs have had Python 3.10.
  if ! (find_python) >/dev/null 2>&1; then
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON="$(python3 -m uv python find 3.12)"
  fi
  prepare_environment tpu
  echo "$(hostname) is set up"
}

running() {
  [[ -f "$JOB/pid" && ! -f "$JOB/status" ]] && kill -0 "$(<"$JOB/pid")" 2>/dev/null
}

start() {
  local log
  if running; then
    # gcloud repeats a command whose connection broke.
    status
    return
  fi
  [[ -x "$VENV_PYTHON" ]] || fail "$(hostname) is not set up; run tpu_setup.sh"
  mkdir -p "$JOB" "$1"
  log="$(cd "$1" && pwd)/$(hostname).log"
  shift
  rm -f "$JOB/pid" "$JOB/status"
  ln -sfn "$log" "$JOB/log"
  cd "$ROOT"
  # In a session of its own, without the terminal: it outlives the connection.
  setsid bash launch/tpu_worker.sh job "$@" </dev/null >>"$log" 2>&1 &
  echo "$!" >"$JOB/pid"
  echo "$(hostname): started, log $log"
}

# The run itself: writes how it ended where `status` finds it, by renaming, so that it is never half there.
job() {
  local status=0 variables=()
  trap : TERM # The signal is for stoppable.sh; this has still to write the status.
  while [[ "$1" != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  env "${variables[@]}" bash launch/stoppable.sh "$VENV_PYTHON" -m balcap_jax.train "$@" || status=$?
  echo "$status" >"$JOB/status.new"
  mv "$JOB/status.new" "$JOB/status"
}

status() {
  local state
  if running; then
    state="running"
  elif [[ ! -f "$JOB/pid" ]]; then
    echo "$(hostname): idle"
    return
  elif [[ ! -f "$JOB/status" ]]; then
    state="failed (killed)" # Without time to write its status: the machine restarted, or memory ran out.
  else
    case "$(<"$JOB/status")" in
      0) state="finished" ;;
      2) state="refused" ;; # The trainer's status for input that is wrong; its last line says what.
      75) state="stopped" ;;
      *) state="failed ($(<"$JOB/status"))" ;;
    esac
  fi
  echo "$(hostname): $state, log $(readlink "$JOB/log")"
}

stop() {
  if running; then
    kill -TERM -- "-$(<"$JOB/pid")" # The whole session that `start` made.
    while running; do sleep 1; done
  fi
  status
}

follow() {
  [[ -f "$JOB/pid" ]] || fail "nothing was started on $(hostname)"
  tail -n 40 --pid="$(<"$JOB/pid")" -F "$JOB/log" 2>/dev/null
  status
  exit "$(cat "$JOB/status" 2>/dev/null || echo 1)"
}

action="${1:-}"
case "$action" in
  setup | start | job | status | stop | follow)
    shift
    "$action" "$@"
    ;;
  *) fail "unknown action '$action'" ;;
esac
