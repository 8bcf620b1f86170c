#!/usr/bin/env bash
# Builds the wheel, and uses it alone: in an environment of its own, in an empty folder.
#
#   bash launch/wheel.sh                    every command's --help, and a smoke run of --config=scenes:tiny
#   bash launch/wheel.sh --config=scenes    the whole main job in place of the smoke run; arguments are those of `train`
#   bash launch/wheel.sh --tests [PYTEST ARGUMENTS]
#                                           the repository's tests against the wheel, in a copy without balcap_jax/
#
# It needs the repository and a network. Settings, as NAME=VALUE before it:
#   PYTHON   of which the environment is made; default: the first of python3 and python
#   FOLDER   where wheel, environment and run go; default: a new folder, which is deleted at the end
set -euo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
[[ -f "$root/setup.py" && -d "$root/balcap_jax" ]] || {
  echo "error: $root is not the repository (no setup.py, or no balcap_jax/); the script builds the wheel from it" >&2
  exit 2
}
folder="${FOLDER:-}"
if [[ -z "$folder" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
fi
python="${PYTHON:-$(command -v python3 || command -v python)}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd -P)"
"$python" -m venv "$folder/venv"
own="$folder/venv/bin/python"
# From a copy: setuptools leaves build/ and *.egg-info/ in the folder that it builds.
mkdir -p "$folder/source" "$folder/empty"
cp -r "$root/balcap_jax" "$root/configs" "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" \
  "$folder/source/"
"$own" -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir "$folder" "$folder/source"
wheel=("$folder"/balcap_jax-*.whl)
unset PYTHONPATH

if [[ "${1:-}" == --tests ]]; then
  "$own" -m pip install -qq --disable-pip-version-check --no-compile "${wheel[0]}[dev]"
  (cd "$root" && tar --exclude=./balcap_jax --exclude=./.git --exclude=./.venv --exclude=./runs -cf - .) |
    (mkdir -p "$folder/checkout" && tar -C "$folder/checkout" -xf -)
  cd "$folder/checkout"
  exec "$own" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "${@:2}"
fi

"$own" -m pip install -qq --disable-pip-version-check --no-compile "${wheel[0]}"
cd "$folder/empty"
balcap="$folder/venv/bin/balcap"
"$balcap" --version
for command in $("$balcap" --help | sed -n 's/^  \([a-z]*\)  .*/\1/p'); do
  "$balcap" "$command" --help >/dev/null
  echo "balcap $command --help"
done
[[ $# -gt 0 ]] || set -- --config=scenes:tiny
"$balcap" train --workdir="$folder/empty/run" --config.data.data_dir="$folder/empty/data" "$@"
"$balcap" report "$folder/empty/run"
test -f "$folder/empty/run/report.html" && test -d "$folder/empty/run/model"
