"""PIIP-LLaVA ConvNeXt-L CLIP-L 1024-336 (1024/336 px), Vicuna-7B v1.5. Encoder: 1037e9 multiply-adds.

Published: MMBench-EN 67.0, MM-Vet 31.4, TextVQA 67.1, SQA-IMG 68.3, GQA 63.9,
VQAv2 81.5, SEED-IMG 69.4, POPE 88.2, average 67.1.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_convnext-l_clip-l_1024-336_7B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_convnext-l_clip-l_1024-336_7B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_convnext-l_clip-l_1024-336_7B"]
