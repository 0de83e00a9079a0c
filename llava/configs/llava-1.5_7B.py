"""LLaVA-1.5 (336 px), Vicuna-7B v1.5. Encoder: 191e9 multiply-adds.

Published: MMBench-EN 64.3, MM-Vet 31.1, TextVQA 58.2, SQA-IMG 66.8, GQA 62.0,
VQAv2 78.5, SEED-IMG 66.1, POPE 85.9, average 64.1.

    sh shell_scripts/llava1_5_pretrain.sh configs/llava-1.5_7B.py
    sh shell_scripts/llava1_5_finetune.sh configs/llava-1.5_7B.py
"""

from piip_llava.rows import ROWS

model = ROWS["llava-1.5_7B"]
