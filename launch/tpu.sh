# shellcheck shell=bash
# Sourced by the scripts that start training on a cluster: command line, configuration file, and how commands are shown
# or run. It keeps to what bash 3.2 knows, which is what macOS has.

LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# What each key of the configuration file is when it is not given; shellcheck cannot see that the scripts read them.
# shellcheck disable=SC2034
{
  name="" project="" zone="" accelerator="" runtime="" provisioning=on-demand queue=no create_flag=()
  attempts=20 backoff=30 wait_minutes=360 restarts=50 poll_seconds=60
  ssh=external mount=none mount_at=/mnt/balcap log_dir=balcap_logs setup_command=() train=() env=()
  gke_image="" gke_accelerator="" gke_topology="" gke_chips_per_host=4 gke_slices=1 gke_claim="" gke_namespace=default
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# The header of the script that is run, without the comment signs.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# read_command_line FLAGS "$@": takes --config=FILE, --dry_run and those of FLAGS; sets conf, dry_run and flags (the
# FLAGS that were given, between spaces), and loads the configuration file.
read_command_line() {
  local known=" $1 " argument
  shift
  conf="$LAUNCH/tpu.conf" dry_run=no flags=" "
  for argument in "$@"; do
    case "$argument" in
      --help | -h) usage && exit 0 ;;
      --config=*) conf="${argument#--config=}" ;;
      --dry_run) dry_run=yes ;;
      *)
        [[ "$known" == *" $argument "* ]] || fail "unknown argument $argument; bash $0 --help lists them"
        flags="$flags$argument "
        ;;
    esac
  done
  load_conf
}

given() {
  [[ "$flags" == *" $1 "* ]]
}

load_conf() {
  local line key value number=0
  [[ -f "$conf" ]] ||
    fail "no configuration file $conf; copy $LAUNCH/tpu.conf.example to it and edit it, or name one: --config=FILE"
  while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    line="${line%$'\r'}"
    [[ "$line" =~ ^[[:space:]]*(#|$) ]] && continue
    [[ "$line" =~ ^[[:space:]]*([a-z_]+)[[:space:]]*=[[:space:]]*(.*)$ ]] ||
      fail "$conf:$number: '$line' is not of the form key = value"
    key="${BASH_REMATCH[1]}"
    value="${BASH_REMATCH[2]}"
    value="${value%"${value##*[![:space:]]}"}"
    case "$key" in
      create_flag) create_flag+=("$value") ;;
      setup_command) setup_command+=("$value") ;;
      train) train+=("$value") ;;
      env)
        [[ "$value" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
          fail "$conf:$number: env = $value is not of the form VARIABLE=VALUE"
        env+=("$value")
        ;;
      name | project | zone | accelerator | runtime | provisioning | queue | ssh | mount | mount_at | log_dir | \
        gke_image | gke_accelerator | gke_topology | gke_claim | gke_namespace) printf -v "$key" %s "$value" ;;
      attempts | backoff | wait_minutes | restarts | poll_seconds | gke_chips_per_host | gke_slices)
        # Bash takes a number with a zero in front for an octal one.
        [[ "$value" =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
          fail "$conf:$number: $key = $value is not a whole number (nine digits at most, no zero in front)"
        case "$key$value" in
          attempts0 | poll_seconds0 | gke_chips_per_host0 | gke_slices0)
            fail "$conf:$number: $key = 0 must be at least 1"
            ;;
        esac
        printf -v "$key" %s "$value"
        ;;
      *) fail "$conf:$number: unknown key $key; tpu.conf.example holds them all" ;;
    esac
  done <"$conf"
  one_of provisioning "$provisioning" on-demand spot reserved preemptible
  one_of queue "$queue" yes no
  one_of ssh "$ssh" external internal iap
  [[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail "$conf: name = '$name' must be small letters, digits and dashes, at most 63, a letter first"
  [[ "$mount" =~ ^(none|nfs://[^/]+/.+|gs://[^/]+)$ ]] ||
    fail "$conf: mount = $mount is none of: none nfs://ADDRESS/EXPORT gs://BUCKET"
}

one_of() {
  local key="$1" value="$2"
  shift 2
  [[ " $* " == *" $value "* ]] || fail "$conf: $key = $value is none of: $*"
}

require_keys() {
  local key
  for key in "$@"; do
    [[ -n "${!key}" ]] || fail "$conf: $key is not set"
  done
}

require_program() {
  [[ "$dry_run" == yes ]] || command -v "$1" >/dev/null ||
    fail "$1 is not on the PATH; install $2, or print the commands with --dry_run"
}

# The arguments of the training command must name a workdir that every process can write to.
check_train() {
  local argument workdir="" recipe=""
  for argument in ${train[@]+"${train[@]}"}; do
    case "$argument" in
      --workdir=*) workdir="${argument#--workdir=}" ;;
      --config=*) recipe=yes ;;
    esac
  done
  [[ -n "$recipe" ]] || fail "$conf: no line train = --config=RECIPE"
  case "$workdir" in
    "") fail "$conf: no line train = --workdir=DIRECTORY" ;;
    gs://?*/?*) return ;;
    /*) ;;
    *) fail "$conf: workdir $workdir must be gs://BUCKET/FOLDER, or an absolute path, the same on every worker" ;;
  esac
  [[ "$workdir/" != */../* ]] || fail "$conf: workdir $workdir goes up by '..'; write the directory it leads to"
  [[ "$mount" == none || "$workdir" == "$mount_at"/* ]] ||
    fail "$conf: workdir $workdir is not under mount_at = $mount_at: it would go with the machines"
}

# A command as one can paste it into a shell.
shown() {
  local argument text=""
  for argument in "$@"; do
    if [[ ! "$argument" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      argument="'$(printf %s "$argument" | sed "s/'/'\\\\''/g")'"
    fi
    text="$text $argument"
  done
  printf '%s\n' "${text# }"
}

run() {
  if [[ "$dry_run" == yes ]]; then
    shown "$@"
  else
    "$@"
  fi
}

# --- Cloud TPU ---

require_tpu() {
  require_keys project zone
  require_program gcloud "the Google Cloud CLI"
}

# tpu GROUP COMMAND NAME FLAGS...: for example tpu tpu-vm delete my-tpu --quiet
tpu() {
  run gcloud compute tpus "$@" "--zone=$zone" "--project=$project"
}

# on_workers WORKER COMMAND: in the home directory of one worker, or of all at the same time.
on_workers() {
  copy_or_run ssh "$name" "--worker=$1" "--command=$2"
}

copy_or_run() {
  case "$ssh" in
    external) tpu tpu-vm "$@" ;;
    internal) tpu tpu-vm "$@" --internal-ip ;;
    iap)
      # Only the alpha command knows the tunnel; it could do the workers in batches, which wait for one another.
      run gcloud alpha compute tpus tpu-vm "$@" --tunnel-through-iap --batch-size=all \
        "--zone=$zone" "--project=$project"
      ;;
  esac
}

# Whether a refusal of gcloud will pass with time. A spent quota will not, though its code says the same.
passing() {
  local signs='RESOURCE_EXHAUSTED|no more capacity|not enough resources|stockout|UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL'
  grep -Eqi "$signs" <<<"$1" && ! grep -Eqi quota <<<"$1"
}

# described GROUP FIELD: a field of what exists under our name, ABSENT when nothing does.
described() {
  local answer attempt
  for attempt in 1 2 3 4 5; do
    if answer="$(gcloud compute tpus "$1" describe "$name" "--format=value($2)" "--zone=$zone" "--project=$project" \
      --verbosity=error 2>&1)"; then
      echo "$answer"
      return
    elif [[ "$answer" == *NOT_FOUND* ]]; then
      echo ABSENT
      return
    fi
    # One answer that got lost must not end hours of waiting.
    if [[ "$attempt" == 5 ]] || ! passing "$answer"; then
      break
    fi
    sleep "$backoff"
  done
  fail "gcloud cannot describe $name: $(tail -n 1 <<<"$answer")"
}

# Prints absent, pending, ready, or lost: preempted, failed or stopped, so that only a new one helps.
tpu_state() {
  local request=ACTIVE machines
  if [[ "$queue" == yes ]]; then
    request="$(described queued-resources state.state)" || exit
  fi
  case "$request" in
    ACTIVE) machines="$(described tpu-vm state)" || exit ;;
    ABSENT) machines=ABSENT ;;
    FAILED | SUSPENDING | SUSPENDED) machines=PREEMPTED ;;
    *) machines=CREATING ;; # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING
  esac
  case "$queue$request$machines" in
    yesACTIVEABSENT) echo lost ;; # A request whose machines have been deleted.
    *ABSENT) echo absent ;;
    *READY) echo ready ;;
    *CREATING | *STARTING | *REIMAGING | *REPAIRING) echo pending ;; # STARTING also ends RESTARTING.
    *) echo lost ;;
  esac
}

delete_tpu() {
  if [[ "$queue" == yes ]]; then
    # --force takes the machines along; without it a request that is active is refused.
    tpu queued-resources delete "$name" --force --quiet
  else
    tpu tpu-vm delete "$name" --quiet
  fi
}
