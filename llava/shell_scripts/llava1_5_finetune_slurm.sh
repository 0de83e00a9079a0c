#!/bin/sh
# Second stage of LLaVA-1.5 on Slurm: language model and projector learn from 665k conversations.
#
#     PARTITION=... GPUS=8 sh shell_scripts/llava1_5_finetune_slurm.sh configs/NAME.py [further options of train.py]
#
# The environment variables that it knows are listed in stage.sh.
set -eu
config=${1:?name a config: configs/NAME.py}
shift
exec sh "$(dirname "$0")/stage.sh" slurm finetune "$config" --freeze_tower True "$@"
