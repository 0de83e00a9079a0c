# Shared by the dist_*.sh and slurm_*.sh of the task folders, which read it with `.`; plain POSIX sh.

fail() {
    echo "$(basename -- "$0"): error: $*" >&2
    exit 2
}

# The Python to run: $PYTHON, else that of the active environment, else the checkout's .venv, else the system's.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
    elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$1/.venv/bin/python" ]; then
        echo "$1/.venv/bin/python"
    elif command -v python >/dev/null; then
        echo python
    else
        echo python3
    fi
}

# processes COUNT SCRIPT [ARGUMENTS]: run the script in COUNT processes on this machine, one per GPU or on the CPU.
# NNODES, NODE_RANK, MASTER_ADDR and PORT join several machines.
processes() {
    count=$1
    shift
    case $count in
    '' | *[!0-9]* | 0*) fail "the number of GPUs (or CPU processes) must be 1 or more, not '$count'" ;;
    esac
    if [ "${NNODES:-1}" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the address of the machine with NODE_RANK=0"
        set -- --nnodes="$NNODES" --node_rank="${NODE_RANK:-0}" --master_addr="$MASTER_ADDR" \
            --master_port="${PORT:-29500}" --nproc_per_node="$count" "$@"
    elif [ -n "${PORT:-}" ]; then
        set -- --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$PORT" --nproc_per_node="$count" "$@"
    else
        set -- --standalone --nproc_per_node="$count" "$@" # takes a free port
    fi
    exec "$python" -m torch.distributed.run "$@" --launcher pytorch
}

# tasks PARTITION JOB_NAME SCRIPT [ARGUMENTS]: run the script as a Slurm job of GPUS tasks, GPUS_PER_NODE on each node,
# with CPUS_PER_TASK CPUs each; SRUN_ARGS holds further options of srun, PORT the port of the first process.
tasks() {
    partition=$1 job=$2
    shift 2
    gpus=${GPUS:-8}
    per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    MASTER_PORT=${PORT:-29500}
    export MASTER_PORT
    # shellcheck disable=SC2086 # SRUN_ARGS is a list of words
    exec srun --partition="$partition" --job-name="$job" --gres=gpu:"$per_node" --ntasks="$gpus" \
        --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "$python" -u "$@" --launcher slurm
}

# What the scripts of a task folder are, whose train.py and test.py lie in the folder $here.

dist_train() {
    [ $# -ge 2 ] || fail "usage: dist_train.sh CONFIG GPUS [options of train.py]"
    config=$1 gpus=$2
    shift 2
    processes "$gpus" "$here/train.py" "$config" "$@"
}

dist_test() {
    [ $# -ge 3 ] || fail "usage: dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]"
    config=$1 checkpoint=$2 gpus=$3
    shift 3
    processes "$gpus" "$here/test.py" "$config" "$checkpoint" "$@"
}

slurm_train() {
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
}

slurm_test() {
    [ $# -ge 4 ] || fail "usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]"
    partition=$1 job=$2 config=$3 checkpoint=$4
    shift 4
    tasks "$partition" "$job" "$here/test.py" "$config" "$checkpoint" "$@"
}
