"""PIIP-LLaVA CLIP-BL 512-448 (512/448 px), Vicuna-7B v1.5. Encoder: 422e9 multiply-adds.

Published: MMBench-EN 66.2, MM-Vet 30.5, TextVQA 59.5, SQA-IMG 68.0, GQA 63.7,
VQAv2 80.3, SEED-IMG 69.0, POPE 87.3, average 65.6.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_clip-bl_512-448_7B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_clip-bl_512-448_7B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_clip-bl_512-448_7B"]
