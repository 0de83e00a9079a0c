"""PIIP-LLaVA ConvNeXt-B CLIP-L 1024-336 (1024/336 px), Vicuna-7B v1.5. Encoder: 598e9 multiply-adds.

Published: MMBench-EN 67.5, MM-Vet 31.5, TextVQA 63.1, SQA-IMG 68.1, GQA 62.7,
VQAv2 81.1, SEED-IMG 69.0, POPE 87.9, average 66.4.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_convnext-b_clip-l_1024-336_7B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_convnext-b_clip-l_1024-336_7B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_convnext-b_clip-l_1024-336_7B"]
