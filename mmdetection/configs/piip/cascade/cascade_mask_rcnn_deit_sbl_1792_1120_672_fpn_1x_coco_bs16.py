"""Cascade Mask R-CNN, PIIP-SBL 1792/1120/672 (DeiT III), 1x, 8 GPUs x 2 images.

Paper (arXiv 2406.04330, Table 2): 53.6 box AP, 46.3 mask AP. The
authors released no config and no weights: resolutions are those of the Mask R-CNN row in the same table, all else is
the recipe of their Mask R-CNN configs.

    sh tools/dist_train.sh configs/piip/cascade/cascade_mask_rcnn_deit_sbl_1792_1120_672_fpn_1x_coco_bs16.py 8
"""

_base_ = ["../../_base_/cascade_mask_rcnn_1x.py", "../../_base_/coco_1792.py"]
model = dict(
    backbone=dict(spec=dict(base="deit3-sbl-1568-1120-672", resolutions=[672, 1120, 1792])),
    neck=dict(in_channels=[1024] * 4),
)
