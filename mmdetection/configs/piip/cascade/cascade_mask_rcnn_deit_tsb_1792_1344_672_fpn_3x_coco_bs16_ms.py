"""Cascade Mask R-CNN, PIIP-TSB 1792/1344/672 (DeiT III), 3x and multi-scale training, 8 GPUs x 2 images.

Paper (arXiv 2406.04330, Table 2): 53.1 box AP, 46.5 mask AP. The
authors released no config and no weights: resolutions are those of the Mask R-CNN row in the same table, all else is
the recipe of their Mask R-CNN configs.

    sh tools/dist_train.sh configs/piip/cascade/cascade_mask_rcnn_deit_tsb_1792_1344_672_fpn_3x_coco_bs16_ms.py 8
"""

_base_ = ["../../_base_/cascade_mask_rcnn_3x.py", "../../_base_/coco_multiscale_1792.py"]
model = dict(
    backbone=dict(spec=dict(base="deit3-tsb-1568-1120-672", resolutions=[672, 1344, 1792], window=28)),
    neck=dict(in_channels=[768] * 4),
)
