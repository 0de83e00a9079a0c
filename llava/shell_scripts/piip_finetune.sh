#!/bin/sh
# Second stage of PIIP-LLaVA: language model, tower and projector learn from 665k conversations.
#
#     sh shell_scripts/piip_finetune.sh configs/NAME.py [further options of train.py]
#
# The environment variables that it knows are listed in stage.sh.
set -eu
exec sh "$(dirname "$0")/stage.sh" torchrun finetune "$@"
