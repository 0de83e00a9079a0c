#!/bin/sh
# First stage of PIIP-LLaVA: projector and interactions learn from 558k captions.
#
#     sh shell_scripts/piip_pretrain.sh configs/NAME.py [further options of train.py]
#
# Environment: GPUS (8), WEIGHTS (folder of the tower's pretrained weights), DATA, OUT.
set -eu
config=${1:?name a config: sh $0 configs/NAME.py}
shift
name=$(basename "$config" .py)
: "${DATA:=playground/data}" "${OUT:=checkpoints}" "${WEIGHTS:=pretrained}"
exec sh "$(dirname "$0")/stage.sh" torchrun "$config" "$OUT/$name-pretrain" \
    --deepspeed "$(dirname "$0")/../scripts/zero2_overlap_comm_false.json" --tune_mm_mlp_adapter True --version plain \
    --data_path "$DATA/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json" --image_folder "$DATA/LLaVA-Pretrain/images" \
    --learning_rate 1e-3 --per_device_train_batch_size 32 --vision_weights "$WEIGHTS" \
    --bf16 True --tf32 True --num_train_epochs 1 --weight_decay 0. --warmup_ratio 0.03 \
    --lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing True --model_max_length 2048 \
    --attention "${ATTENTION:-flash_attention_2}" --dataloader_num_workers 4 --report_to tensorboard \
    --save_strategy steps --save_steps "${SAVE_STEPS:-2000}" --save_total_limit 1 "$@"
