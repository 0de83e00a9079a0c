"""What a run is made of: model, optimizer, schedule, mixing of images and loss, all of them timm's but the model."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from piip import Classifier
from piip.checkpoint import load_checkpoint
from piip.errors import RunError
from piip.optim import classifier_groups, param_groups
from piip_cls.config import Config

Loss = Callable[[Tensor, Tensor], Tensor]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop, or its type where there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def build_model(config: Config, args: argparse.Namespace, classes: int) -> Classifier:
    """Build the model of a config with the weights that the options name.

    Args:
        config: The config.
        args: Options; `resume` of a run that goes on is left to `piip_cls.checkpoints`.
        classes: Classes of the data set.

    Raises:
        RunError: The config asks for another number of classes.
        CheckpointError: Weights are missing or do not fit.
    """
    if config.model.get("num_classes", classes) != classes:
        raise RunError(f"{config.name} says num_classes={config.model['num_classes']}, the data have {classes} classes")
    model = Classifier(**{**config.model, "num_classes": classes})
    given = args.load_from or (args.resume if args.eval else "")
    folder = args.pretrained or config.pretrained
    if given:
        load_checkpoint(model, given, drop_head=args.drop_head)
    elif folder and folder != "none" and not args.resume:
        model.load_pretrained(folder)
    return model


def build_optimizer(model: Classifier, args: argparse.Namespace, processes: int) -> torch.optim.Optimizer:
    """Return timm's optimizer, the learning rate scaled with the total batch unless `--unscale-lr`.

    Raises:
        RunError: The optimizer needs what is not installed, or does not take the options.
    """
    lr = args.lr if args.unscale_lr else args.lr * args.batch_size * processes / 512
    groups = classifier_groups(model, args.from_scratch_lr_ratio, legacy=args.legacy_recipe)
    options: dict[str, Any] = {"eps": args.opt_eps}
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    gathered = param_groups(model.named_parameters(), groups, lr, args.weight_decay)
    for group in gathered:
        del group["names"]
    try:
        return create_optimizer_v2(gathered, args.opt, lr, args.weight_decay, args.momentum, **options)
    except (AssertionError, ImportError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"--opt {args.opt} does not work here or with the options given for it ({first_line(error)}): change "
            "those, or take another"
        ) from error


class Schedule:
    """Learning rates per epoch.

    Args:
        optimizer: The optimizer.
        args: Options. `legacy_recipe` is one epoch late: the original steps after the epoch, with its number.

    Raises:
        RunError: The schedule does not take the options, or this version of timm does not have it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
        self.lag = int(args.legacy_recipe)
        noise = args.lr_noise
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=args.sched,
                num_epochs=args.epochs,
                decay_epochs=args.decay_epochs,
                decay_rate=args.decay_rate,
                cooldown_epochs=args.cooldown_epochs,
                patience_epochs=args.patience_epochs,
                min_lr=args.min_lr,
                warmup_lr=args.warmup_lr,
                warmup_epochs=args.warmup_epochs,
                warmup_prefix=args.warmup_prefix,
                noise=noise[0] if noise and len(noise) == 1 else noise,
                noise_pct=args.lr_noise_pct,
                noise_std=args.lr_noise_std,
                noise_seed=args.seed,
            )
        except (AssertionError, ValueError) as error:
            raise RunError(
                f"--sched {args.sched} does not work with the options given for it: {first_line(error)}"
            ) from error
        if scheduler is None:  # what an older timm answers to a name that it does not know
            raise RunError(f"this version of timm has no --sched {args.sched}: pip install -U timm, or take another")
        self.scheduler: Scheduler = scheduler

    def start(self, epoch: int, metric: float | None = None) -> None:
        """Set the learning rates of an epoch; `metric` is the last top-1 (for schedules that wait for a plateau)."""
        self.scheduler.step(max(epoch - self.lag, 0), metric)

    def state_dict(self) -> dict[str, Any]:
        """Return what does not follow from the epoch, as plain values; empty but for `plateau`.

        timm's own state leaves out how long the plateau has lasted, and the learning rates without the noise.
        """
        if not isinstance(self.scheduler, PlateauLRScheduler):
            return {}
        return {"plateau": self.scheduler.lr_scheduler.state_dict(), "restore_lr": self.scheduler.restore_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.lr_scheduler.load_state_dict(dict(state["plateau"]))
            self.scheduler.restore_lr = state["restore_lr"]


def build_mixup(args: argparse.Namespace, classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix, None where they are off."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    if args.batch_size % 2:
        raise RunError(f"--batch-size {args.batch_size}: mixup pairs images, so an even number is needed")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return class numbers `(B,)` as smoothed probabilities `(B, classes)`, as timm's mixup does."""
    rest = smoothing / classes
    return torch.full((len(labels), classes), rest, device=labels.device).scatter_(
        1, labels[:, None], 1 - smoothing + rest
    )


def build_loss(args: argparse.Namespace) -> Loss:
    """Return the loss of logits `(B, classes)` and probabilities `(B, classes)`."""

    def binary(logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets.gt(0).to(logits.dtype))

    return binary if args.bce_loss else nn.CrossEntropyLoss()


def cosub_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of two sub-models that learn from the targets and from each other (arXiv 2212.04884, eq. 1).

    Args:
        logits: `(2 B, classes)`, the same images through two samples of drop path.
        targets: `(B, classes)`.
    """
    loss = F.binary_cross_entropy_with_logits
    one, other = logits.float().chunk(2)
    targets = targets.gt(0).to(one.dtype)
    apart = loss(one, targets) + loss(other, targets)
    together = loss(one, other.detach().sigmoid()) + loss(other, one.detach().sigmoid())
    return (apart + together) / 4
