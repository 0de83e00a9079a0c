#!/bin/sh
# One training stage, as the scripts beside it start it.
#
#     stage.sh LAUNCHER pretrain|finetune CONFIG [options of train.py ...]
#
# LAUNCHER is `torchrun` (GPUS processes on this machine) or `slurm` (GPUS processes in the partition PARTITION).
# Environment: GPUS (8), GRAD_ACC (4, second stage), WEIGHTS (folder of the tower's pretrained weights), DATA, OUT,
# ADAPTER (second stage: what the first one wrote), ATTENTION, SAVE_STEPS, PARTITION.
set -eu
launcher=$1 stage=$2 config=${3:?name a config: configs/NAME.py}
shift 3
name=$(basename "$config" .py)
here=$(cd "$(dirname "$0")/.." && pwd)
: "${GPUS:=8}" "${GPUS_PER_NODE:=8}" "${PORT:=29500}" "${PYTHON:=python}" "${CPUS_PER_TASK:=8}"
[ "$GPUS" -lt "$GPUS_PER_NODE" ] && GPUS_PER_NODE=$GPUS
: "${DATA:=playground/data}" "${OUT:=checkpoints}" "${WEIGHTS:=pretrained}" "${GRAD_ACC:=4}"
: "${ADAPTER:=$OUT/$name-pretrain/mm_projector.bin}"
case $stage in
pretrain)
    output=$OUT/$name-pretrain
    set -- --deepspeed "$here/scripts/zero2_overlap_comm_false.json" --tune_mm_mlp_adapter True --version plain \
        --data_path "$DATA/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json" --image_folder "$DATA/LLaVA-Pretrain/images" \
        --learning_rate 1e-3 --per_device_train_batch_size 32 "$@" ;;
finetune)
    output=$OUT/$name
    set -- --deepspeed "$here/scripts/zero3.json" --version v1 --image_aspect_ratio pad \
        --data_path "$DATA/llava_v1_5_mix665k.json" --image_folder "$DATA" --group_by_modality_length True \
        --learning_rate 2e-5 --per_device_train_batch_size $((16 / GRAD_ACC)) \
        --gradient_accumulation_steps "$GRAD_ACC" --pretrain_mm_mlp_adapter "$ADAPTER" "$@" ;;
*)
    echo "unknown stage '$stage'; known: pretrain, finetune" >&2
    exit 2 ;;
esac
set -- --vision_weights "$WEIGHTS" --bf16 True --tf32 True --num_train_epochs 1 --weight_decay 0. --warmup_ratio 0.03 \
    --lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing True --model_max_length 2048 \
    --attention "${ATTENTION:-flash_attention_2}" --dataloader_num_workers 4 --report_to tensorboard \
    --save_strategy steps --save_steps "${SAVE_STEPS:-2000}" --save_total_limit 1 "$@"
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
