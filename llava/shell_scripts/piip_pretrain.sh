#!/bin/sh
# First stage of PIIP-LLaVA: projector and interactions learn from 558k captions.
#
#     sh shell_scripts/piip_pretrain.sh configs/NAME.py [further options of train.py]
#
# The environment variables that it knows are listed in stage.sh.
set -eu
exec sh "$(dirname "$0")/stage.sh" torchrun pretrain "$@"
