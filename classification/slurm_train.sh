#!/bin/sh
# Train as a Slurm job with the recipe of the published rows; GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS
# are read from the environment.
#     sh slurm_train.sh PARTITION JOB_NAME MODEL --data-path IMAGENET [options of main.py]
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/../tools/launch.sh"
python=$(find_python "$here/..")

[ $# -ge 3 ] || fail "usage: slurm_train.sh PARTITION JOB_NAME MODEL --data-path IMAGENET [options of main.py]"
partition=$1 job=$2 model=$3
shift 3
tasks "$partition" "$job" "$here/main.py" --model "$model" --batch-size 128 --lr 3e-5 --epochs 20 --weight-decay 0.1 \
    --reprob 0.0 --seed 0 --unscale-lr --no-repeated-aug --from_scratch_lr_ratio 10 --output_dir "exp/$model" "$@"
