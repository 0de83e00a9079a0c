"""The mini data of `tools/make_mini_data.py --out data/mini`, COCO layout; $PIIP_DATA replaces `data`."""

_base_ = ["mmdet::_base_/datasets/coco_instance.py"]
data_root = "{{$PIIP_DATA:data}}/mini/coco/"
classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    # Digits are not mirrored: a flipped two is no two. Images are not padded: a norm of constant pixels has gradients
    # without bound in a network that starts from few or no pretrained weights.
    dict(type="RandomResize", scale=(192, 192), ratio_range=(1.0, 1.3), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(192, 192)),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(192, 192), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=classes),
        filter_cfg=dict(min_size=16),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = val_evaluator
