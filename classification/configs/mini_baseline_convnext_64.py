"""One mini ConvNeXt of as many multiply-adds as the mini pyramid, for the comparison in `make demo-cls`.

sh dist_train.sh mini_baseline_convnext_64 1 --data-path MINI/imagefolder
"""

_options = dict(depths=(1, 1, 2, 1), widths=(36, 48, 72, 96), layer_scale=1.0, stem="overlap_act")
model = dict(spec=dict(branches=[dict(arch="convnext", resolution=64, options=_options)], head="branches"))
