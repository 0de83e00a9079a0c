#!/bin/sh
# Train on the GPUs of one machine, or on several with NNODES, NODE_RANK, MASTER_ADDR and PORT (without GPUs: on the CPU).
#     sh dist_train.sh MODEL GPUS --data-path IMAGENET [options of main.py]
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/../tools/launch.sh"
python=$(find_python "$here/..")

[ $# -ge 2 ] || fail "usage: dist_train.sh MODEL GPUS --data-path IMAGENET [options of main.py]"
model=$1 gpus=$2
shift 2
processes "$gpus" "$here/main.py" --model "$model" "$@"
