#!/bin/sh
# Second stage of LLaVA-1.5: language model and projector learn from 665k conversations.
#
#     sh shell_scripts/llava1_5_finetune.sh configs/NAME.py [further options of train.py]
#
# The environment variables that it knows are listed in stage.sh.
set -eu
config=${1:?name a config: configs/NAME.py}
shift
exec sh "$(dirname "$0")/stage.sh" torchrun finetune "$config" --freeze_tower True "$@"
