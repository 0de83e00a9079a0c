"""LLaVA-1.5 (336 px), Vicuna-13B v1.5. Encoder: 191e9 multiply-adds.

Published: MMBench-EN 67.7, MM-Vet 36.1, TextVQA 61.3, SQA-IMG 71.6, GQA 63.3,
VQAv2 80.0, SEED-IMG 68.2, POPE 85.9, average 66.8.

    sh shell_scripts/llava1_5_pretrain.sh configs/llava-1.5_13B.py
    sh shell_scripts/llava1_5_finetune.sh configs/llava-1.5_13B.py
"""

from piip_llava.rows import ROWS

model = ROWS["llava-1.5_13B"]
