"""The mini data of `tools/make_mini_data.py --layout ade --out data/mini`; $PIIP_DATA replaces `data`.

Configs take the data loaders under their own names, in place of those of their base.
"""

mini_data = dict(
    type="BaseSegDataset",
    data_root="{{$PIIP_DATA:data}}/mini/ade/",
    metainfo=dict(
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
            (255, 187, 120),
            (23, 190, 207),
        ],
    ),
    reduce_zero_label=True,
)
mini_train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **mini_data,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            # Digits are not mirrored: a flipped two is no two.
            dict(type="RandomResize", scale=(192, 192), ratio_range=(1.0, 1.3), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(192, 192)),
            dict(type="PackSegInputs"),
        ],
    ),
)
mini_val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **mini_data,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        # mmsegmentation loads the labels last: the metric compares at the image's own size.
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(192, 192), keep_ratio=True),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
