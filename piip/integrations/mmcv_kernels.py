"""The operations that ``mmcv_ops.py`` puts into its stand-in for ``mmcv._ext``, on CPU and CUDA tensors.

Signatures and conventions are the extension's: mmcv calls these functions by keyword from inside its own autograd
functions, so nothing here is recorded, and most results are written into tensors that the caller allocated.
Reduced-precision inputs are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from piip.deformable import sample_torch
from piip.integrations.mmcv_ops import MissingOpError

_LINEAR, _GAUSSIAN = 1, 2
_MAX_POOL = 0


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy suppression of boxes whose overlap with a better kept box exceeds the threshold.

    Args:
        boxes: (N, 4) corners x1, y1, x2, y2 in pixels.
        scores: (N,).
        iou_threshold: an overlap equal to it is kept.
        offset: 0, or 1 where a box covers its last pixel, so that its width is x2 - x1 + 1.

    Returns:
        (K,) int64 indices of the kept boxes, best first.
    """
    if offset:
        # In double, moving the far corner by a pixel is exact.
        boxes = boxes.double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    else:
        boxes = _wide(boxes)
    # Compare in the precision of the overlaps: a pair whose overlap is the threshold itself stays.
    threshold = torch.tensor(iou_threshold, dtype=boxes.dtype).item()
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), threshold)


def _overlaps(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """Intersection over union of one box (4,) with boxes (N, 4), 0 where both are empty: (N,)."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset).clamp(min=0)
    inter = sides.prod(1)
    union = (box[2:] - box[:2] + offset).prod() + (boxes[:, 2:] - boxes[:, :2] + offset).prod(1) - inter
    return torch.where(union > 0, inter / union, 0)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Suppression that lowers the scores of overlapping boxes instead of dropping them.

    Args:
        boxes: (N, 4) corners x1, y1, x2, y2 in pixels.
        scores: (N,).
        dets: (N, 5), written: its first K rows become corners and final score, in the order of selection.
        iou_threshold: overlap from which the naive and the linear method act.
        sigma: width of the gaussian method.
        min_score: a box that falls below it is dropped.
        method: 0 naive (drop), 1 linear, 2 gaussian.
        offset: 0, or 1 where a box covers its last pixel.

    Returns:
        (K,) int64 indices of the selected boxes.
    """
    left = _wide(torch.cat([boxes, scores[:, None]], dim=1))
    index = torch.arange(len(left), device=left.device)
    selected: list[int] = []
    while len(index):
        best = int(left[:, 4].argmax())
        row = left[best].clone()
        dets[len(selected)] = row
        selected.append(int(index[best]))
        overlap = _overlaps(row[:4], left[:, :4], offset)
        if method == _GAUSSIAN:
            weight = torch.exp(-overlap.square() / sigma)
        else:
            weight = torch.where(overlap >= iou_threshold, 1 - overlap if method == _LINEAR else 0.0, 1.0)
        left[:, 4] *= weight
        # Not `>= min_score`: a score that is not a number stays, as in the compiled operation.
        keep = ~(left[:, 4] < min_score)
        keep[best] = False
        left, index = left[keep], index[keep]
    return torch.tensor(selected, dtype=torch.int64, device=boxes.device)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average bilinear samples over the bins of each region.

    Args:
        input: (B, C, H, W).
        rois: (N, 5) image index and corners x1, y1, x2, y2 in image pixels.
        output: (N, C, aligned_height, aligned_width), written.
        argmax_y: unused, part of max pooling.
        argmax_x: unused, part of max pooling.
        aligned_height: bins per column.
        aligned_width: bins per row.
        spatial_scale: input pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for as many as the bin has pixels, rounded up.
        pool_mode: 1 for the mean; 0, the maximum, is not available.
        aligned: whether pixel centres lie at half coordinates.

    Raises:
        MissingOpError: `pool_mode` is 0.
    """
    if pool_mode == _MAX_POOL:
        raise MissingOpError("roi_align with pool_mode='max'")
    features = _wide(input)
    pooled = torch.ops.torchvision.roi_align(
        features, rois.to(features.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of :func:`roi_align_forward` into `grad_input` (B, C, H, W).

    Args:
        grad_output: (N, C, aligned_height, aligned_width).
        rois: as in the forward pass.
        argmax_y: unused, part of max pooling.
        argmax_x: unused, part of max pooling.
        grad_input: (B, C, H, W), written.
        aligned_height: as in the forward pass.
        aligned_width: as in the forward pass.
        spatial_scale: as in the forward pass.
        sampling_ratio: as in the forward pass.
        pool_mode: as in the forward pass, which refuses 0.
        aligned: as in the forward pass.
    """
    grad = _wide(grad_output)
    # torchvision's own backward step: it needs the shape of the input only, so nothing is computed twice.
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad,
            rois.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _levels(shapes: Tensor, starts: Tensor) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """Index, range of positions and (height, width) of each level; shapes (L, 2), starts (L,)."""
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        yield level, slice(start, start + height * width), (height, width)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention: per query, the weighted sum of bilinear samples from every level.

    The levels are sampled one after the other, by the kernel of our own attention.

    Args:
        value: (B, S, heads, C), the levels one after the other.
        value_spatial_shapes: (L, 2) height and width of each level.
        value_level_start_index: (L,) first position of each level in `value`.
        sampling_locations: (B, Q, heads, L, P, 2) as x, y in [0, 1] of each level; outside lies zero.
        attention_weights: (B, Q, heads, L, P).
        im2col_step: unused, a chunk size of the compiled operation.

    Returns:
        (B, Q, heads*C) in the type of `value`.
    """
    batch, queries, heads = sampling_locations.shape[:3]
    wide_value, locations, weights = _wide(value), _wide(sampling_locations), _wide(attention_weights)
    output = wide_value.new_zeros(batch, queries, heads * value.shape[-1])
    for level, tokens, grid in _levels(value_spatial_shapes, value_level_start_index):
        output += sample_torch(wide_value[:, tokens], grid, locations[:, :, :, level], weights[:, :, :, level])
    return output.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the three gradients of :func:`ms_deform_attn_forward`, sampling each level once more.

    Args:
        value: as in the forward pass.
        value_spatial_shapes: as in the forward pass.
        value_level_start_index: as in the forward pass.
        sampling_locations: as in the forward pass.
        attention_weights: as in the forward pass.
        grad_output: (B, Q, heads*C).
        grad_value: shaped like `value`, written.
        grad_sampling_loc: shaped like `sampling_locations`, written.
        grad_attn_weight: shaped like `attention_weights`, written.
        im2col_step: unused, a chunk size of the compiled operation.
    """
    for level, tokens, grid in _levels(value_spatial_shapes, value_level_start_index):
        parts = value[:, tokens], sampling_locations[:, :, :, level], attention_weights[:, :, :, level]
        leaves = [_wide(part).detach().requires_grad_() for part in parts]
        part_value, locations, weights = leaves
        # mmcv's backward runs with gradients off.
        with torch.enable_grad():
            output = sample_torch(part_value, grid, locations, weights)
        grads = torch.autograd.grad(output, leaves, _wide(grad_output))
        targets = grad_value[:, tokens], grad_sampling_loc[:, :, :, level], grad_attn_weight[:, :, :, level]
        for target, grad in zip(targets, grads, strict=True):
            target.copy_(grad)


def _focal_parts(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sign of each logit's class, the logit of the right answer, and the balance factor, all (N, C)."""
    logits = _wide(input)
    positive = target[:, None] == torch.arange(logits.shape[1], device=logits.device)
    sign = 2 * positive.to(logits.dtype) - 1
    balance = torch.where(positive, logits.new_tensor(alpha), logits.new_tensor(1 - alpha))
    if weight.numel():
        # Background rows carry a target without an entry in the table; they count as they are.
        known = (target >= 0) & (target < len(weight))
        balance = balance * torch.where(known, weight[target.clamp(0, len(weight) - 1)], 1)[:, None]
    return sign, sign * logits, balance


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of each logit.

    With p the probability of the right answer, -a (1 - p)^gamma log(p), where a is `alpha` for the target class and
    1 - `alpha` for the others. log(p) is exact for logits of any size, where the compiled operation saturates.

    Args:
        input: (N, C) logits.
        target: (N,) int64 class; one outside 0 to C - 1 is background.
        weight: (C,) factor per target class, or empty.
        output: (N, C), written.
        gamma: exponent.
        alpha: share of the positive class.
    """
    _, right, balance = _focal_parts(input, target, weight, alpha)
    output.copy_(-balance * torch.sigmoid(-right) ** gamma * F.logsigmoid(right))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of :func:`sigmoid_focal_loss_forward` by its logits.

    Args:
        input: as in the forward pass.
        target: as in the forward pass.
        weight: as in the forward pass.
        grad_input: (N, C), written.
        gamma: as in the forward pass.
        alpha: as in the forward pass.
    """
    sign, right, balance = _focal_parts(input, target, weight, alpha)
    wrong_probability = torch.sigmoid(-right)
    slope = gamma * torch.sigmoid(right) * F.logsigmoid(right) - wrong_probability
    grad_input.copy_(sign * balance * wrong_probability**gamma * slope)


def get_compiler_version() -> str:
    """What mmcv's environment report prints as its compiler."""
    return "none (operations of piip)"


def get_compiling_cuda_version() -> str:
    """What mmcv's environment report prints as its CUDA version."""
    return "none (operations of piip)"


OPS = {
    function.__name__: function
    for function in (
        get_compiler_version,
        get_compiling_cuda_version,
        ms_deform_attn_backward,
        ms_deform_attn_forward,
        nms,
        roi_align_backward,
        roi_align_forward,
        sigmoid_focal_loss_backward,
        sigmoid_focal_loss_forward,
        softnms,
    )
}
