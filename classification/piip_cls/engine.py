"""One epoch of training, and exact evaluation."""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from piip.errors import OwnError
from piip_cls.processes import Processes
from piip_cls.recipe import Loss, Schedule, cosub_loss, soft_targets


@dataclass
class Trainer:
    """What stays the same from epoch to epoch.

    Attributes:
        model: The model, wrapped for several processes where there are any.
        optimizer: The optimizer.
        schedule: Its learning rates per epoch.
        scaler: Scales the loss under float16; does nothing where it is disabled.
        loss: The loss.
        mixup: Mixing of images, None for none.
        ema: Moving average of the weights, None for none.
        autocast: Context of the model's precision.
        args: Options.
        classes: Number of classes.
        processes: This process among the others.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    loss: Loss
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    autocast: torch.autocast
    args: argparse.Namespace
    classes: int
    processes: Processes

    def train_epoch(self, loader: Iterable[Any], steps: int, report: Callable[[str], None]) -> float:
        """Train for one epoch and return the mean loss over all processes.

        Args:
            loader: Batches of images `(B, 3, H, W)` and classes `(B,)`.
            steps: Number of batches.
            report: Takes a line on the progress now and then.

        Raises:
            RunError: The loss is not finite.
        """
        self.model.train(self.args.train_mode)
        self.optimizer.zero_grad(set_to_none=True)
        accumulate, total, start = self.args.accum_iter, 0.0, time.monotonic()
        for step, (images, labels) in enumerate(loader):
            closing = (step + 1) % accumulate == 0 or step + 1 == steps
            size = min(accumulate, steps - step // accumulate * accumulate)  # the last group may be smaller
            wait = nullcontext() if closing or self.processes.count == 1 else self.model.no_sync()
            with wait:
                loss = self._loss(*(t.to(self.processes.device, non_blocking=True) for t in (images, labels)))
                value = loss.item()
                if not math.isfinite(value):
                    raise OwnError(f"the loss is {value} in step {step + 1}: nothing was saved; lower --lr?")
                self.scaler.scale(loss / size).backward()
            if closing:
                self._step()
            total += value
            if step % max(steps // 10, 1) == 0:
                pace = (time.monotonic() - start) / (step + 1)
                report(f"[{step + 1}/{steps}] loss {value:.4f} {pace:.3f} s/step")
        return self.processes.sum(torch.tensor([total / steps], dtype=torch.float64)).item() / self.processes.count

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        else:
            targets = soft_targets(labels, self.classes, self.args.smoothing)
        if self.args.cosub:
            images = torch.cat([images, images])
        with self.autocast:
            logits = self.model(images)
        return cosub_loss(logits, targets) if self.args.cosub else self.loss(logits.float(), targets)

    def _step(self) -> None:
        if self.args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(bare(self.model))


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside its wrapper for several processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@dataclass(frozen=True)
class Result:
    """What an evaluation measured, over every image once.

    Attributes:
        top1: Share of images whose most likely class is the right one, in percent.
        top5: The same for the five most likely ones.
        loss: Mean cross-entropy.
        images: Number of images.
        classes: Number of classes.
        pairs: Class, prediction and number of images `(P, 3)` of every pair that occurs, in order.
    """

    top1: float
    top5: float
    loss: float
    images: int
    classes: int
    pairs: Tensor

    @property
    def confusion(self) -> Tensor:
        """Images by class (row) and prediction (column), `(classes, classes)`."""
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        rows, columns, images = self.pairs.unbind(1)
        return matrix.index_put_((rows, columns), images)

    def __str__(self) -> str:
        """Return the line that the original prints."""
        return f"* Acc@1 {self.top1:.3f} Acc@5 {self.top5:.3f} loss {self.loss:.3f} on {self.images} images"

    def figures(self) -> dict[str, float]:
        """Return the figures for a log."""
        return {"acc1": self.top1, "acc5": self.top5, "loss": self.loss, "images": self.images}


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[Any], classes: int, processes: Processes, autocast: Any = None
) -> Result:
    """Evaluate a model on every image exactly once, on any number of processes and any batch size.

    Args:
        model: The model, not wrapped: processes may have different numbers of batches. It stays on its device, which
            may be the CPU while the processes speak over their GPUs.
        loader: This process's share of the images.
        classes: Number of classes.
        processes: This process among the others.
        autocast: Context of the model's precision.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64)  # top-1, top-5, loss, images
    cells = [torch.empty(0, dtype=torch.int64)]  # of the confusion matrix, row by row: one per image
    for images, labels in loader:
        with autocast or nullcontext():
            logits = model(images.to(device))
        logits = logits.float().cpu()
        best = logits.topk(min(5, classes), dim=1).indices
        hits = best == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), losses.sum(), torch.tensor(float(len(labels)))]).double()
        cells.append(labels * classes + best[:, 0])
    top1, top5, loss, count = processes.sum(sums).tolist()
    # Only what occurs travels: a matrix of thousands of classes is nearly empty.
    found, times = processes.gather(torch.cat(cells)).unique(return_counts=True)
    pairs = torch.stack([found // classes, found % classes, times], dim=1)
    return Result(100 * top1 / count, 100 * top5 / count, loss / count, int(count), classes, pairs)
