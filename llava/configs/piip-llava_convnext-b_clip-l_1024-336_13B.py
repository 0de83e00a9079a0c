"""PIIP-LLaVA ConvNeXt-B CLIP-L 1024-336 (1024/336 px), Vicuna-13B v1.5. Encoder: 598e9 multiply-adds in
the table, which repeats the 7B row's figure: this model's are 732e9.

Published: MMBench-EN 68.5, MM-Vet 37.7, TextVQA 64.2, SQA-IMG 71.1, GQA 64.2,
VQAv2 81.8, SEED-IMG 69.3, POPE 87.9, average 68.0.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_convnext-b_clip-l_1024-336_13B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_convnext-b_clip-l_1024-336_13B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_convnext-b_clip-l_1024-336_13B"]
