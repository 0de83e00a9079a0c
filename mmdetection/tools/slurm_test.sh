#!/bin/sh
# Evaluate as a Slurm job; GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS are read from the environment.
#     sh tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/../../tools/launch.sh"
python=$(find_python "$here/../..")
slurm_test "$@"
