#!/usr/bin/env bash
# From a published checkpoint to scores before and after training, in order; docs/reproduce.md has the same commands.
#
#   MODEL=DIR DATA=DIR BENCH=DIR JUDGE=URL,URL bash launch/reproduce.sh WORKDIR
#
# The same command goes on where it was stopped or killed: each of its commands does. Settings, as NAME=VALUE before it:
#   MODEL       directory of the checkpoint, as `hf download` leaves it
#   RECIPE      qwen25vl_3b, qwen25vl_7b, qwen3vl_2b, qwen3vl_4b, qwen3vl_8b or llava15_7b, with variants:
#               qwen25vl_3b:lora; default: qwen25vl_3b
#   DATA        folder with ShareGPT4V's JSON and the pictures that it names
#   ANNOTATIONS name of that JSON; default: the one of its 100,000 captions by GPT-4V
#   BENCH       folder of benchmarks, laid out as docs/evaluation.md says
#   JUDGE       addresses of the chat servers that write references, reward and evaluate; launch/judge_server.sh prints them
#   REFERENCES  file with what the reward needs beside a picture, in place of the references that would be written;
#               the variants caprl (questions) and rubicap (criteria) need one
#   TRAIN       more arguments of `train`: "--config.stages.rl.steps=100 --config.judge.model=NAME"
#   JUDGING     more arguments of `recaption` and `evaluate`: "--judge.model=NAME --judge.concurrency=256"
#   PYTHON      default: that of .venv, which launch/quickstart.sh makes, or python
#
#   --dry_run   print the commands, start nothing
#   --estimate  print what references and rewards will cost, and stop
#   --doctor    check checkpoint, data, references, judge, disks, time and money of the training, and stop
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

dry_run=0 estimate=0 doctor=0 workdir=""
for argument in "$@"; do
  case "$argument" in
    --help | -h)
      sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --dry_run) dry_run=1 ;;
    --estimate) estimate=1 ;;
    --doctor) doctor=1 ;;
    -*) fail "unknown argument $argument (see --help)" ;;
    *)
      [[ -z "$workdir" ]] || fail "one WORKDIR, got $workdir and $argument"
      workdir="$argument"
      ;;
  esac
done
[[ -n "$workdir" ]] || fail "name a WORKDIR (see bash launch/reproduce.sh --help)"

# Before the first command: references take days, and a missing benchmark would be noticed at the end.
for setting in MODEL DATA BENCH JUDGE; do
  [[ -n "${!setting:-}" ]] || fail "set $setting (see bash launch/reproduce.sh --help)"
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
recipe="${RECIPE:-qwen25vl_3b}"
references="${REFERENCES:-}"
case ",${recipe#*:}," in
  *,scenes,*) fail "RECIPE=$recipe needs no data and no judge: balcap train --config=$recipe --workdir=DIR" ;;
  *,caprl,* | *,rubicap,*) [[ -n "$references" ]] || fail "RECIPE=$recipe: set REFERENCES to a file with what it asks" ;;
esac
annotations="${ANNOTATIONS:-sharegpt4v_instruct_gpt4-vision_cap100k.json}"
if [[ "$dry_run" == 0 ]]; then
  [[ -f "$root/configs/${recipe%%:*}.py" ]] || fail "RECIPE=$recipe: there is no configs/${recipe%%:*}.py"
  for folder in "MODEL $MODEL" "DATA $DATA" "BENCH $BENCH"; do
    [[ -d "${folder#* }" ]] || fail "${folder%% *}: there is no folder ${folder#* }"
  done
  found=0
  for name in dcscore.jsonl captionqa.json captionqa.jsonl caparena.json bcapscore.jsonl checklist.jsonl; do
    [[ -f "$BENCH/$name" ]] && found=1
  done
  [[ "$found" == 1 && -d "$BENCH/images" ]] || fail "BENCH: $BENCH holds no benchmark and its images; docs/evaluation.md has the layout"
  [[ -z "$references" || -f "$references" ]] || fail "REFERENCES: there is no file $references"
  [[ -f "$DATA/$annotations" ]] || fail "DATA: there is no $annotations in $DATA; put it there, or set ANNOTATIONS"
fi
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python
  [[ -x "$root/.venv/bin/python" ]] && python="$root/.venv/bin/python"
fi
read -r -a training <<<"${TRAIN:-}"
read -r -a judging <<<"${JUDGING:-}"

step() {
  printf 'balcap %s\n' "$(printf '%q ' "$@" | sed 's/ $//')"
  if [[ "$dry_run" == 0 ]]; then
    (cd "$root" && PYTHONUNBUFFERED=1 "$python" -m "balcap_jax.$1" "${@:2}")
  fi
}

if [[ "$dry_run" == 0 ]]; then
  (cd "$root" && "$python" -m balcap_jax.config "--config=$recipe" >/dev/null)  # It names an unknown variant.
  if [[ "$workdir" != gs://* ]]; then
    mkdir -p "$workdir"
    workdir="$(cd "$workdir" && pwd -P)"
  fi
  [[ -z "$references" ]] || references="$(realpath "$references")"
  MODEL="$(cd "$MODEL" && pwd -P)" DATA="$(cd "$DATA" && pwd -P)" BENCH="$(cd "$BENCH" && pwd -P)"
fi
units="${references:-$workdir/references.jsonl}"
writing=(--images="$DATA/$annotations" --root="$DATA" --out="$units" --judge.endpoints="$JUDGE")
run=(--config="$recipe" --workdir="$workdir/run" --config.model.path="$MODEL" --config.data.manual_dir="$DATA"
  --config.data.units="$units" --config.judge.endpoints="$JUDGE")
[[ "$annotations" == sharegpt4v_instruct_gpt4-vision_cap100k.json ]] || run+=(--config.data.annotations="$annotations")

if [[ "$estimate" == 1 ]]; then
  [[ -n "$references" ]] || step recaption "${writing[@]}" "${judging[@]}" --estimate
  step train "${run[@]}" "${training[@]}" --estimate_judge
  exit 0
fi
if [[ "$doctor" == 1 ]]; then
  step doctor "${run[@]}" "${training[@]}"
  exit 0
fi
step convert --from="$MODEL" --check
[[ -n "$references" ]] || step recaption "${writing[@]}" "${judging[@]}"
step train "${run[@]}" "${training[@]}"
step evaluate --suite=captions --model="$workdir/run/model" --data="$BENCH" --out="$workdir/eval/rl" \
  --judge.endpoints="$JUDGE" "${judging[@]}"
step evaluate --suite=captions --model="$MODEL" --like="$workdir/eval/rl/captions.jsonl" --data="$BENCH" \
  --out="$workdir/eval/base" --judge.endpoints="$JUDGE" "${judging[@]}"
step compare "$workdir/eval/base" "$workdir/eval/rl" --out="$workdir/comparison"
step convert --from="$workdir/run/model" --check
