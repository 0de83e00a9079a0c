#!/bin/sh
# First stage of LLaVA-1.5: the projector learns from 558k captions.
#
#     sh shell_scripts/llava1_5_pretrain.sh configs/NAME.py [further options of train.py]
#
# The environment variables that it knows are listed in stage.sh.
set -eu
exec sh "$(dirname "$0")/stage.sh" torchrun pretrain "$@"
