#!/bin/sh
# First stage of PIIP-LLaVA on Slurm: projector and interactions learn from 558k captions.
#
#     PARTITION=... GPUS=8 sh shell_scripts/piip_pretrain_slurm.sh configs/NAME.py [further options of train.py]
#
# The environment variables that it knows are listed in stage.sh.
set -eu
exec sh "$(dirname "$0")/stage.sh" slurm pretrain "$@"
