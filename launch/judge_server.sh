#!/usr/bin/env bash
# Starts a judge on this machine, one server or several, and returns when they answer:
#
#   bash launch/judge_server.sh MODEL [-- MORE ARGUMENTS OF THE SERVER]
#   bash launch/judge_server.sh Qwen/Qwen2.5-VL-7B-Instruct
#   REPLICAS=8 HOST=0.0.0.0 bash launch/judge_server.sh Qwen/Qwen2.5-VL-7B-Instruct     # one server a GPU, for a pod
#   bash launch/judge_server.sh model.gguf -- --mmproj mmproj.gguf
#
# MODEL is a name or directory for vLLM, or a .gguf file for llama.cpp. The servers go on running; the last line says
# how to end them. Settings, as NAME=VALUE before the command:
#   ENGINE   vllm, llama-server (llama.cpp) or llama_cpp (llama-cpp-python); default: by MODEL and by what is installed
#   HOST     127.0.0.1, this machine alone; 0.0.0.0 for others too (anybody who reaches the port may ask)
#   PORT     8000, of the first server; the others have the next ones
#   REPLICAS 1 server, each with a copy of the model; vLLM only
#   GPUS     1 GPU of each replica, over which vLLM splits the model; with one replica it takes those that it finds
#   KEY_ENV  the environment variable with the key that vLLM demands, the same that judge.api_key_env names; none
#   CONTEXT  8192 tokens of one request: prompt, picture and answer
#   SLOTS    8 requests at once (llama-server; vLLM decides by itself)
#   WAIT     1800 seconds until it must answer
#   LOG      judge_server.log, what the server prints; with replicas LOG.PORT of each
#
#   --dry_run   print the command, start nothing
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

dry_run=0 model=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    --help | -h)
      usage
      exit 0
      ;;
    --dry_run) dry_run=1 ;;
    --)
      shift
      break
      ;;
    -*) fail "unknown argument $1 (arguments of the server go behind --; see --help)" ;;
    *)
      [[ -z "$model" ]] || fail "one MODEL, got $model and $1"
      model="$1"
      ;;
  esac
  shift
done
[[ -n "$model" ]] || fail "name a MODEL (see bash launch/judge_server.sh --help)"

host="${HOST:-127.0.0.1}" port="${PORT:-8000}" context="${CONTEXT:-8192}" slots="${SLOTS:-8}"
seconds="${WAIT:-1800}" log="${LOG:-judge_server.log}" python="${PYTHON:-python3}"
replicas="${REPLICAS:-1}" gpus="${GPUS:-1}" key_env="${KEY_ENV:-}"
for setting in "PORT $port" "CONTEXT $context" "SLOTS $slots" "WAIT $seconds" "REPLICAS $replicas" "GPUS $gpus"; do
  [[ "${setting#* }" =~ ^[1-9][0-9]{0,6}$ ]] || fail "${setting% *} must be a whole number, got '${setting#* }'"
done

engine="${ENGINE:-}"
if [[ -z "$engine" ]]; then
  if [[ "$model" != *.gguf ]]; then
    engine=vllm
  elif command -v llama-server >/dev/null; then
    engine=llama-server
  else
    engine=llama_cpp
  fi
fi
[[ "$engine" == vllm || "$replicas$gpus$key_env" == 11 ]] || fail "REPLICAS, GPUS and KEY_ENV are for vLLM, not $engine"
[[ -z "$key_env" || "$key_env" =~ ^[A-Z_][A-Z0-9_]*$ ]] || fail "KEY_ENV must name a variable, such as JUDGE_KEY"
[[ -z "$key_env" || -n "${!key_env:-}" ]] || fail "KEY_ENV names $key_env, which is not set"
[[ $((port + replicas)) -le 65536 ]] || fail "PORT $port leaves no room for $replicas replicas"

# The command of the server at port $1, in the array `command`. vLLM keeps the beginnings of prompts (prefix caching):
# the captions of one picture share theirs. It is told of one picture a question, so that it reserves no room for more.
command_of() {
  case "$engine" in
    vllm)
      command=(vllm serve "$model" --host "$host" --port "$1" --max-model-len "$context"
        --enable-prefix-caching --limit-mm-per-prompt '{"image": 1}')
      [[ "$gpus" == 1 ]] || command+=(--tensor-parallel-size "$gpus")
      ;;
    llama-server) # It shares its context among the slots.
      command=(llama-server --model "$model" --host "$host" --port "$1"
        --ctx-size "$((context * slots))" --parallel "$slots")
      ;;
    llama_cpp)
      command=("$python" -m llama_cpp.server --model "$model" --host "$host" --port "$1" --n_ctx "$context")
      ;;
    *) fail "ENGINE must be vllm, llama-server or llama_cpp, got '$engine'" ;;
  esac
  command+=("${more[@]}")
}

# The GPUs of replica $1, counted from 0: those of CUDA_VISIBLE_DEVICES, where it is set, in their order.
devices_of() {
  local first=$(($1 * gpus)) names=() i
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    IFS=, read -r -a names <<<"$CUDA_VISIBLE_DEVICES"
  else
    for ((i = 0; i < replicas * gpus; i++)); do names+=("$i"); done
  fi
  [[ "${#names[@]}" -ge $((replicas * gpus)) ]] ||
    fail "$replicas replicas of $gpus GPUs need $((replicas * gpus)) GPUs, and CUDA_VISIBLE_DEVICES names ${#names[@]}"
  local taken=("${names[@]:first:gpus}")
  (IFS=, && echo "${taken[*]}")
}

more=("$@")
command_of "$port"
[[ "$replicas" == 1 ]] || devices_of 0 >/dev/null
if [[ "$dry_run" == 1 ]]; then
  for ((i = 0; i < replicas; i++)); do
    command_of "$((port + i))"
    [[ "$replicas" == 1 ]] || printf 'CUDA_VISIBLE_DEVICES=%s ' "$(devices_of "$i")"
    printf '%q ' "${command[@]}"
    echo
  done
  exit 0
fi
command -v "${command[0]}" >/dev/null || fail "${command[0]} is not installed; install it, or choose another ENGINE"
[[ "$model" != *.gguf || -f "$model" ]] || fail "$model: no such file"

# A server that listens everywhere answers here too, and others reach it by this machine's name.
local_host="$host" shown_host="$host"
if [[ "$host" == 0.0.0.0 ]]; then
  local_host=127.0.0.1 shown_host="$(hostname -f 2>/dev/null || hostname)"
fi
key=""
if [[ -n "$key_env" ]]; then
  key="${!key_env}"
  export VLLM_API_KEY="$key" # Not as an argument: those are seen by everybody on the machine.
fi

# Whether the server at port $1 lists its models; a port that another program holds would answer something else, or
# nothing.
answers() {
  JUDGE_SERVER_KEY="$key" "$python" - "http://$local_host:$1/v1/models" <<'PYTHON' 2>/dev/null
import json, os, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
key = os.environ["JUDGE_SERVER_KEY"]
request = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {key}"} if key else {})
with opener.open(request, timeout=5) as response:
    print(json.load(response)["data"][0]["id"])
PYTHON
}

ports=() endpoints=() servers=() logs=()
for ((i = 0; i < replicas; i++)); do
  ports+=("$((port + i))")
  endpoints+=("http://$shown_host:$((port + i))/v1")
  if answers "$((port + i))" >/dev/null; then
    fail "something answers at http://$local_host:$((port + i)) already; end it, or choose another PORT"
  fi
done
end_all() { kill "${servers[@]}" 2>/dev/null || true; }
trap 'end_all; exit 130' INT TERM
for ((i = 0; i < replicas; i++)); do
  command_of "${ports[i]}"
  logs+=("$log")
  if [[ "$replicas" != 1 ]]; then
    logs[i]="$log.${ports[i]}"
    devices="$(devices_of "$i")"
    CUDA_VISIBLE_DEVICES="$devices" nohup "${command[@]}" >"${logs[i]}" 2>&1 </dev/null &
  else
    nohup "${command[@]}" >"${logs[i]}" 2>&1 </dev/null &
  fi
  servers+=("$!")
  echo "starting ${command[0]} (process ${servers[i]}); what it prints is in ${logs[i]}"
done
begun="$SECONDS"
for ((i = 0; i < replicas; i++)); do
  until name="$(answers "${ports[i]}")"; do
    for ((k = i; k < replicas; k++)); do
      if ! kill -0 "${servers[k]}" 2>/dev/null; then
        status=0
        wait "${servers[k]}" || status=$?
        end_all
        tail -n 5 "${logs[k]}" >&2
        fail "the server ended with status $status before it answered (its last lines are above, all are in ${logs[k]})"
      fi
    done
    if ((SECONDS - begun > seconds)); then
      end_all
      fail "no answer within $seconds s, the servers are ended; see ${logs[i]}, or raise WAIT"
    fi
    sleep 1
  done
done
echo "$name answers after $((SECONDS - begun)) s; train with:"
flags="--config.judge.name=remote --config.judge.endpoints=$(IFS=, && echo "${endpoints[*]}")"
[[ -z "$key_env" ]] || flags+=" --config.judge.api_key_env=$key_env"
echo "  $flags"
echo "end it with: kill ${servers[*]}"
