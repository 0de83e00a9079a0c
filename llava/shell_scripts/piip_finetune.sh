#!/bin/sh
# Second stage of PIIP-LLaVA: language model, tower and projector learn from 665k conversations.
#
#     sh shell_scripts/piip_finetune.sh configs/NAME.py [further options of train.py]
#
# Environment: GPUS (8), GRAD_ACC (4), WEIGHTS (folder of the tower's pretrained weights), DATA, OUT, ADAPTER.
set -eu
config=${1:?name a config: sh $0 configs/NAME.py}
shift
name=$(basename "$config" .py)
: "${DATA:=playground/data}" "${OUT:=checkpoints}" "${WEIGHTS:=pretrained}"
: "${GRAD_ACC:=4}" "${ADAPTER:=$OUT/$name-pretrain/mm_projector.bin}"
exec sh "$(dirname "$0")/stage.sh" torchrun "$config" "$OUT/$name" \
    --deepspeed "$(dirname "$0")/../scripts/zero3.json" --version v1 --image_aspect_ratio pad \
    --data_path "$DATA/llava_v1_5_mix665k.json" --image_folder "$DATA" --group_by_modality_length True \
    --learning_rate 2e-5 --per_device_train_batch_size $((16 / GRAD_ACC)) --gradient_accumulation_steps "$GRAD_ACC" \
    --vision_weights "$WEIGHTS" --pretrain_mm_mlp_adapter "$ADAPTER" \
    --bf16 True --tf32 True --num_train_epochs 1 --weight_decay 0. --warmup_ratio 0.03 \
    --lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing True --model_max_length 2048 \
    --attention "${ATTENTION:-flash_attention_2}" --dataloader_num_workers 4 --report_to tensorboard \
    --save_strategy steps --save_steps "${SAVE_STEPS:-2000}" --save_total_limit 1 "$@"
