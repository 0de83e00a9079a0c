"""A classifier in timm's own training loop: the parts of its train script, in its order."""

import torch
from timm.data import Mixup, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy, unwrap_model

from piip import create_model

BRANCHES = [
    {"arch": "vit", "resolution": side, "options": {
        "embed_dim": 32, "depth": 2, "num_heads": 2, "pos_grid": (side // 16, side // 16), "pos_prefix": 1,
        "class_token": True}}
    for side in (32, 48, 64)
]  # fmt: skip


def test_a_few_steps_of_timms_training():
    model = create_model({"branches": BRANCHES, "interactions": 2, "heads": 2, "head": "branches"}, num_classes=4)
    model.set_grad_checkpointing(enable=True)
    data = resolve_data_config({}, model=model)
    assert data["input_size"] == (3, 64, 64)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 1.0)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(Options()))
    without_decay = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    assert id(model.pyramid.branches[0].pos_embed) in without_decay
    ema = ModelEmaV3(model, decay=0.5)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=3, warmup_epochs=0, updates_per_epoch=4)
    mixup = Mixup(mixup_alpha=0.2, num_classes=4)
    loss_fn, scaler, losses = SoftTargetCrossEntropy(), NativeScaler(), AverageMeter()
    images, labels = torch.randn(8, *data["input_size"]), torch.arange(8) % 4
    images += labels[:, None, None, None]
    history = []
    for epoch in range(3):
        model.train()
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_fn(model(mixup(images.clone(), labels)[0]), mixup(images.clone(), labels)[1])
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=True)
            ema.update(model)
            losses.update(loss.item())
            schedule.step_update(epoch * 4 + step)
        schedule.step(epoch + 1)
        history.append(losses.avg)
        losses.reset()
    assert history[-1] < history[0]
    model.eval()
    with torch.inference_mode():
        top1, _ = accuracy(model(images), labels, topk=(1, 4))
        assert ema(images).shape == (8, 4)
    assert 0 <= float(top1) <= 100
    assert unwrap_model(model) is model
    assert model.num_classes == model.get_classifier()[0].out_features == 4


class Options:
    """What timm's train script reads of its command line for the optimizer."""

    opt, lr, weight_decay, momentum = "adamw", 3e-3, 0.05, 0.9
