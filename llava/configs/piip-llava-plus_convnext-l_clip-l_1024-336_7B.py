"""PIIP-LLaVA-Plus ConvNeXt-L CLIP-L 1024-336 (1024/336 px), Vicuna-7B v1.5. Encoder: 1037e9 multiply-adds.

Published: MMBench-EN 74.5, MM-Vet 44.7, TextVQA 73.0, SQA-IMG 95.0, GQA 62.9,
VQAv2 82.3, SEED-IMG 72.1, POPE 87.5, average 74.0.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava-plus_convnext-l_clip-l_1024-336_7B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava-plus_convnext-l_clip-l_1024-336_7B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava-plus_convnext-l_clip-l_1024-336_7B"]
