#!/bin/sh
# Second stage of PIIP-LLaVA on Slurm: language model, tower and projector learn from 665k conversations.
#
#     PARTITION=... GPUS=8 sh shell_scripts/piip_finetune_slurm.sh configs/NAME.py [further options of train.py]
#
# The environment variables that it knows are listed in stage.sh.
set -eu
exec sh "$(dirname "$0")/stage.sh" slurm finetune "$@"
