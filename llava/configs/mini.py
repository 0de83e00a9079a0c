"""A small PIIP-LLaVA for the mini data: what `make demo-llava` trains. Two ConvNeXt branches, 64 and 128 pixels.

python train.py --vision_tower configs/mini.py --model_name_or_path LM --data_path DATA/pretrain.json ...
"""

from piip_llava.rows import Row

_SMALL = dict(depths=(1, 1, 3, 1), widths=(24, 48, 96, 160), layer_scale=0.1)
_LARGE = dict(depths=(1, 1, 4, 1), widths=(40, 80, 160, 224), layer_scale=0.1)
model = Row(
    language_model="",
    tower=dict(
        type="pyramid",
        spec=dict(
            branches=[
                dict(arch="convnext", resolution=64, weights="large.safetensors", blocks=(5, 5), options=_LARGE),
                dict(arch="convnext", resolution=128, weights="small.safetensors", blocks=(5, 4), options=_SMALL),
            ],
            interactions=2,
            heads=4,
            drop_path=0.0,
        ),
    ),
    projector=dict(type="separate"),
    statistics=dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)),
)
