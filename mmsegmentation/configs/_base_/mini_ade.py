"""The mini data of `tools/make_mini_data.py --layout ade --out data/mini`; $PIIP_DATA replaces `data`."""

_base_ = ["mmseg::_base_/datasets/ade20k.py"]
data_root = "{{$PIIP_DATA:data}}/mini/ade/"
metainfo = dict(
    classes=("background", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    palette=[
        (96, 96, 96),
        (31, 119, 180),
        (255, 127, 14),
        (44, 160, 44),
        (214, 39, 40),
        (148, 103, 189),
        (140, 86, 75),
        (227, 119, 194),
        (240, 230, 60),
        (188, 189, 34),
        (23, 190, 207),
    ],
)
dataset = dict(
    _delete_=True,
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=metainfo,
    reduce_zero_label=True,
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        # Digits are not mirrored: a flipped two is no two.
        dict(type="RandomResize", scale=(192, 192), ratio_range=(1.0, 1.3), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(192, 192)),
        dict(type="PackSegInputs"),
    ],
)
train_dataloader = dict(batch_size=8, num_workers=1, persistent_workers=False, dataset=dataset)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        **{
            **dataset,
            "data_prefix": dict(img_path="images/validation", seg_map_path="annotations/validation"),
            "pipeline": [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
        }
    ),
)
test_dataloader = val_dataloader
