#!/bin/sh
# One training stage; called by the other scripts, not by hand.
#
#     stage.sh LAUNCHER CONFIG OUTPUT [options of train.py ...]
#
# LAUNCHER is `torchrun` (GPUS processes on this machine) or `slurm` (GPUS processes in the partition PARTITION).
set -eu
launcher=$1 config=$2 output=$3
shift 3
here=$(cd "$(dirname "$0")/.." && pwd)
: "${GPUS:=8}" "${GPUS_PER_NODE:=8}" "${PORT:=29500}" "${PYTHON:=python}" "${CPUS_PER_TASK:=8}"
[ "$GPUS" -lt "$GPUS_PER_NODE" ] && GPUS_PER_NODE=$GPUS
case $launcher in
torchrun)
    exec "$PYTHON" -m torch.distributed.run --nproc_per_node="$GPUS" --master_port="$PORT" \
        "$here/train.py" --vision_tower "$config" --output_dir "$output" "$@" ;;
slurm)
    : "${PARTITION:?name the Slurm partition: PARTITION=... sh $0 ...}"
    nodes=$(((GPUS + GPUS_PER_NODE - 1) / GPUS_PER_NODE))
    # One torchrun per node; it starts the processes of the node and finds the others through the first node.
    # shellcheck disable=SC2016,SC2086
    exec srun -p "$PARTITION" --job-name="$(basename "$output")" --nodes="$nodes" --ntasks="$nodes" \
        --ntasks-per-node=1 --gres=gpu:"$GPUS_PER_NODE" --cpus-per-task="$((CPUS_PER_TASK * GPUS_PER_NODE))" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        sh -c 'gpus=$1 port=$2 && shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec "$0" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:$port" "$@"' \
        "$PYTHON" "$GPUS_PER_NODE" "$PORT" "$here/train.py" --vision_tower "$config" --output_dir "$output" "$@" ;;
*)
    echo "unknown launcher '$launcher'; known: torchrun, slurm" >&2
    exit 2 ;;
esac
