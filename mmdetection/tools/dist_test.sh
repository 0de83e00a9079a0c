#!/bin/sh
# Evaluate on the GPUs of one machine, or on several with NNODES, NODE_RANK, MASTER_ADDR and PORT (without GPUs: on the CPU).
#     sh tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/../../tools/launch.sh"
python=$(find_python "$here/../..")
dist_test "$@"
