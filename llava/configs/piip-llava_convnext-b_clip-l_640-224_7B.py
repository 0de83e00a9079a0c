"""PIIP-LLaVA ConvNeXt-B CLIP-L 640-224 (640/224 px), Vicuna-7B v1.5. Encoder: 191e9 multiply-adds.

Published: MMBench-EN 64.5, MM-Vet 31.9, TextVQA 59.0, SQA-IMG 68.3, GQA 62.1,
VQAv2 79.9, SEED-IMG 67.5, POPE 86.5, average 65.0.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_convnext-b_clip-l_640-224_7B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_convnext-b_clip-l_640-224_7B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_convnext-b_clip-l_640-224_7B"]
