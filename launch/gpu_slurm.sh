#!/usr/bin/env bash
#SBATCH --job-name=balcap
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=balcap-%j.log
#
# Trains on several GPU hosts under Slurm, one process per GPU. To be submitted from the repository root, which holds a
# .venv with the cuda extra (docs/pods.md); everything behind the script goes to balcap_jax.train.
#
#   sbatch [--nodes=4 --time=12:00:00 ...] launch/gpu_slurm.sh --config=configs/qwen25vl_3b.py --workdir=DIRECTORY
#   bash launch/gpu_slurm.sh --dry_run --config=...      prints the commands
#
# DIRECTORY must be one that all hosts see. Five minutes before the time limit (--signal above) every process gets
# SIGTERM, saves and stops; the job then queues again under its number and goes on from there. So it does after a
# preemption or the loss of a host. The log is appended to.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

dry_run=no workdir="" recipe="" train=()
for argument in "$@"; do
  case "$argument" in
    --help | -h) sed -n '/^#$/,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --dry_run) dry_run=yes && continue ;;
    --workdir=/* | --workdir=gs://?*) workdir="${argument#--workdir=}" ;;
    --workdir=*) fail "$argument: give gs://BUCKET/FOLDER, or the absolute path of a directory that all hosts see" ;;
    --config=*) recipe=yes ;;
  esac
  train+=("$argument")
done
[[ -n "$recipe" && -n "$workdir" ]] || fail "give the training command's --config=RECIPE and --workdir=DIRECTORY"

# One task per GPU is how JAX counts processes under Slurm: it gives each task the GPU of its number on the host, so
# every task must see all of them (--gpus-per-node, not --gpus-per-task). When a process is lost the others end by
# themselves. Slurm is not to kill them when the first one ends: as they all stop in good order, that would look like a
# failure. Since Slurm 22.05 a step does not inherit the job's CPUs per task, and would have one.
cpus="${SLURM_CPUS_PER_TASK:-}"
[[ "$dry_run" == no ]] || cpus="$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$0")"
step=(srun ${cpus:+"--cpus-per-task=$cpus"} --kill-on-bad-exit=0 --wait=300 --label
  bash launch/stoppable.sh .venv/bin/python -m balcap_jax.train "${train[@]}")
if [[ "$dry_run" == yes ]]; then
  echo "# submits:"
  printf '%q ' sbatch launch/gpu_slurm.sh "${train[@]}"
  printf '\n# which runs on the first host:\n'
  printf '%q ' env BALCAP_DISTRIBUTED=1 "${step[@]}"
  echo
  exit
fi

# Slurm runs a copy of this script from elsewhere.
[[ -n "${SLURM_JOB_ID:-}" ]] || fail "not in a Slurm job; submit it: sbatch launch/gpu_slurm.sh ... (or --dry_run)"
cd "$SLURM_SUBMIT_DIR"
[[ -f launch/stoppable.sh ]] || fail "$SLURM_SUBMIT_DIR is not the repository; submit from its root"
[[ -x .venv/bin/python ]] || fail "no .venv in $SLURM_SUBMIT_DIR; make it there: see docs/pods.md"
tasks="${SLURM_NTASKS_PER_NODE:-no}" gpus="${SLURM_GPUS_ON_NODE:-no}"
[[ "$tasks" == "$gpus" ]] ||
  fail "$tasks tasks for $gpus GPUs on a host; give --ntasks-per-node and --gpus-per-node the same number"
export BALCAP_DISTRIBUTED=1

# The steps get the signal; should this shell get one too (on a preemption), it waits for them. `:` and not '': what is
# ignored would be ignored by srun as well.
trap : TERM
status=0
"${step[@]}" || status=$?
case "$status" in
  0) echo "finished" ;;
  75)
    # A bound, so that a run which is stopped before its first checkpoint does not go round for ever.
    [[ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]] ||
      fail "queued 100 times and not finished; is --time too short for one checkpoint?"
    echo "stopped; queueing again"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
  *) fail "training ended with status $status, see above; the same sbatch command goes on from the newest checkpoint" ;;
esac
