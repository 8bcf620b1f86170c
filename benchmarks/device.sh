#!/bin/sh
# What is worth knowing of an accelerator, in under ten minutes: see device.py, which this starts with the Python that has
# balcap_jax (PYTHON, else python3). All arguments are device.py's: --small, --only, --out, --peak_flops, --bandwidth ...
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "error: $python is not installed; PYTHON names another" >&2; exit 1; }
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
for package in jax flax optax ml_collections; do
    "$python" -c "import $package" 2>/dev/null || {
        echo "error: $python has no $package; install balcap_jax in it first (README.md), or name another in PYTHON" >&2
        exit 1
    }
done
exec "$python" "$here/device.py" "$@"
