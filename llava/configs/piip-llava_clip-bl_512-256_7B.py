"""PIIP-LLaVA CLIP-BL 512-256 (512/256 px), Vicuna-7B v1.5. Encoder: 193e9 multiply-adds.

Published: MMBench-EN 63.8, MM-Vet 32.0, TextVQA 57.9, SQA-IMG 68.8, GQA 62.8,
VQAv2 79.1, SEED-IMG 67.3, POPE 86.5, average 64.8.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_clip-bl_512-256_7B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_clip-bl_512-256_7B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_clip-bl_512-256_7B"]
