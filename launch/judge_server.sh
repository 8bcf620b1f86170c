#!/usr/bin/env bash
# Starts a judge on this machine and returns when it answers:
#
#   bash launch/judge_server.sh MODEL [-- MORE ARGUMENTS OF THE SERVER]
#   bash launch/judge_server.sh Qwen/Qwen2.5-VL-7B-Instruct
#   bash launch/judge_server.sh model.gguf -- --mmproj mmproj.gguf
#
# MODEL is a name or directory for vLLM, or a .gguf file for llama.cpp. The server goes on running; the last line says
# how to end it. Settings, as NAME=VALUE before the command:
#   ENGINE   vllm, llama-server (llama.cpp) or llama_cpp (llama-cpp-python); default: by MODEL and by what is installed
#   HOST     127.0.0.1      PORT     8000
#   CONTEXT  8192 tokens of one request: prompt, picture and answer
#   SLOTS    8 requests at once (llama-server; vLLM decides by itself)
#   WAIT     1800 seconds until it must answer
#   LOG      judge_server.log, what the server prints
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
for setting in "PORT $port" "CONTEXT $context" "SLOTS $slots" "WAIT $seconds"; do
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
case "$engine" in
  vllm) command=(vllm serve "$model" --host "$host" --port "$port" --max-model-len "$context") ;;
  llama-server) # It shares its context among the slots.
    command=(llama-server --model "$model" --host "$host" --port "$port"
      --ctx-size "$((context * slots))" --parallel "$slots")
    ;;
  llama_cpp)
    command=("$python" -m llama_cpp.server --model "$model" --host "$host" --port "$port" --n_ctx "$context")
    ;;
  *) fail "ENGINE must be vllm, llama-server or llama_cpp, got '$engine'" ;;
esac
command+=("$@")

if [[ "$dry_run" == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
command -v "${command[0]}" >/dev/null || fail "${command[0]} is not installed; install it, or choose another ENGINE"
[[ "$model" != *.gguf || -f "$model" ]] || fail "$model: no such file"

# Whether the server lists its models; a port that another program holds would answer something else, or nothing.
answers() {
  "$python" - "http://$host:$port/v1/models" <<'PYTHON' 2>/dev/null
import json, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(sys.argv[1], timeout=5) as response:
    print(json.load(response)["data"][0]["id"])
PYTHON
}

if answers >/dev/null; then
  fail "something answers at http://$host:$port already; end it, or choose another PORT"
fi
nohup "${command[@]}" >"$log" 2>&1 </dev/null &
server=$!
trap 'kill "$server" 2>/dev/null; exit 130' INT TERM
echo "starting ${command[0]} (process $server); what it prints is in $log"
begun="$SECONDS"
until name="$(answers)"; do
  if ! kill -0 "$server" 2>/dev/null; then
    status=0
    wait "$server" || status=$?
    tail -n 5 "$log" >&2
    fail "the server ended with status $status before it answered (its last lines are above, all are in $log)"
  fi
  if ((SECONDS - begun > seconds)); then
    kill "$server" 2>/dev/null || true
    fail "no answer within $seconds s, the server is ended; see $log, or raise WAIT"
  fi
  sleep 1
done
echo "$name answers after $((SECONDS - begun)) s; train with:"
echo "  --config.judge.name=remote --config.judge.endpoints=http://$host:$port/v1"
echo "end it with: kill $server"
