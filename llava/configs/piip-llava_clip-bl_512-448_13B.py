"""PIIP-LLaVA CLIP-BL 512-448 (512/448 px), Vicuna-13B v1.5. Encoder: 422e9 multiply-adds.

Published: MMBench-EN 67.6, MM-Vet 36.1, TextVQA 61.6, SQA-IMG 71.0, GQA 64.5,
VQAv2 81.2, SEED-IMG 69.5, POPE 87.2, average 67.3.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_clip-bl_512-448_13B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_clip-bl_512-448_13B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_clip-bl_512-448_13B"]
