"""PIIP-LLaVA ConvNeXt-L CLIP-L 1024-336 (1024/336 px), Vicuna-13B v1.5. Encoder: 1037e9 multiply-adds in
the table, which repeats the 7B row's figure: this model's are 1214e9.

Published: MMBench-EN 66.5, MM-Vet 36.8, TextVQA 69.2, SQA-IMG 69.8, GQA 65.2,
VQAv2 82.5, SEED-IMG 70.5, POPE 87.6, average 68.5.

    sh shell_scripts/piip_pretrain.sh configs/piip-llava_convnext-l_clip-l_1024-336_13B.py
    sh shell_scripts/piip_finetune.sh configs/piip-llava_convnext-l_clip-l_1024-336_13B.py
"""

from piip_llava.rows import ROWS

model = ROWS["piip-llava_convnext-l_clip-l_1024-336_13B"]
