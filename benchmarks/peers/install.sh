#!/bin/sh
# Makes the environments of the benchmarks' peers: install.sh FOLDER [trl] [verl] [swift] [tunix] (all by default).
# Each is FOLDER/NAME with its own packages; PYTHON names the interpreter (3.11 to 3.13). About 1 GB each.
set -eu
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [trl] [verl] [swift] [tunix]" >&2; exit 2; }
folder=$1
shift
[ $# -ge 1 ] || set -- trl verl swift tunix

# torch first and by this version: where the index offers it, that is the build without CUDA. Named again beside what
# needs it, so that nothing replaces it.
TORCH="torch==2.13.0"

for name in "$@"; do
    "${PYTHON:-python3}" -m venv "$folder/$name"
    pip="$folder/$name/bin/pip"
    case $name in
    trl)
        # The environment of the peers transformers and unpadded too.
        "$pip" install -q "$TORCH"
        "$pip" install -q "$TORCH" "trl==1.16.0" "transformers==5.23.0" safetensors
        ;;
    verl)
        # Only verl.trainer.ppo.core_algos is imported; all of verl's requirements would bring its rollout engines' too.
        "$pip" install -q "$TORCH" numpy
        "$pip" install -q --no-deps "verl==0.9.1"
        "$pip" install -q "$TORCH" "ray>=2.41" "tensordict<=0.10.0" "transformers>=5.5.3,<5.11" omegaconf packaging codetiming
        ;;
    swift)
        # Only swift.rl_core.advantage is imported; the rest is what it needs to load.
        "$pip" install -q "$TORCH" numpy
        "$pip" install -q --no-deps "ms-swift==4.6.0"
        "$pip" install -q "$TORCH" "transformers<5.15" "datasets<4.8.5" modelscope "trl<1.0" "peft<0.21" accelerate \
            pandas requests json_repair pillow
        ;;
    tunix) "$pip" install -q "google-tunix==0.1.7" ;;
    *)
        echo "unknown peer $name" >&2
        exit 2
        ;;
    esac
    echo "$folder/$name/bin/python"
done
