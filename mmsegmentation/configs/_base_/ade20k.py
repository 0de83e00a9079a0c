"""ADE20K, crops of 512 pixels. In evaluation the short side has 512 pixels, however long the other is: no window is
larger than the image.
"""

_base_ = ["mmseg::_base_/datasets/ade20k.py"]
train_dataloader = dict(batch_size=2)
test_pipeline = _base_.test_pipeline
test_pipeline[1] = dict(type="ResizeShortestEdge", scale=512, max_size=10**6)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
