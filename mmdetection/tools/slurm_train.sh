#!/bin/sh
# Train as a Slurm job; GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS are read from the environment.
#     sh tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options of train.py]
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/../../tools/launch.sh"
python=$(find_python "$here/../..")

[ $# -ge 3 ] || fail "usage: slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options of train.py]"
partition=$1 job=$2 config=$3
shift 3
case ${1:--} in
-*) ;;
*)
    work_dir=$1
    shift
    set -- --work-dir "$work_dir" "$@"
    ;;
esac
tasks "$partition" "$job" "$here/train.py" "$config" "$@"
