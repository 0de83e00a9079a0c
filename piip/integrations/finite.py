"""A run whose numbers are no longer finite stops, and its last good checkpoint stays."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from piip.errors import OwnError
from piip.integrations.saving import latest_checkpoint


class NotFiniteError(OwnError):
    """A loss or a weight is NaN or infinite; the message names the step."""


@HOOKS.register_module()
class StopAtNaNHook(Hook):
    """Stops training at the first loss that is not finite, and never lets weights be saved that are not.

    A step with a finite loss can leave NaN weights, which the next loss shows: by then they must not have replaced a
    good checkpoint.
    """

    priority = "VERY_HIGH"  # before any hook that saves or averages weights

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Check the loss.

        Raises:
            NotFiniteError: It is not finite.
        """
        losses = {name: value for name, value in (outputs or {}).items() if "loss" in name}
        if "loss" not in losses or torch.isfinite(torch.as_tensor(losses["loss"])).all():
            return
        values = {name: torch.as_tensor(value) for name, value in losses.items()}
        bad = [f"{name} {value.item()}" for name, value in values.items() if not torch.isfinite(value).all()]
        self._stop(runner, runner.iter + 1, ", ".join(bad))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Check the weights; costs little beside writing them.

        Raises:
            NotFiniteError: One is not finite.
        """
        for name, parameter in runner.model.named_parameters():
            here = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3, the part that this process holds
            if not torch.isfinite(here).all():
                self._stop(runner, checkpoint["meta"]["iter"], f"weights ({name}), which are not saved")

    def _stop(self, runner: Runner, step: int, what: str) -> NoReturn:
        last = latest_checkpoint(runner.work_dir)
        kept = f"the last checkpoint, {last}, is from before it" if last else "no checkpoint had been saved"
        raise NotFiniteError(
            f"training stopped at step {step}, not finite: {what}; {kept}. Lower "
            "the learning rate, clip gradients (optim_wrapper.clip_grad.max_norm), or check the data"
        )
