#!/bin/sh
# MMBench-EN, MM-Vet, TextVQA, ScienceQA-IMG, GQA, VQAv2, SEED-IMG and POPE, with LLaVA-1.5's questions and prompts.
#
#     sh shell_scripts/eval.sh CHECKPOINT [options of piip_llava.evaluation.run, for example --benchmarks pope,gqa]
#
# Questions and images are in DATA, in the layout of LLaVA's playground/data/eval. Results go to results/CHECKPOINT.
set -eu
checkpoint=${1:?name a checkpoint: sh $0 CHECKPOINT}
shift
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$here:$here/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m piip_llava.evaluation.run \
    --model_path "$checkpoint" --data "${DATA:-playground/data/eval}" "$@"
