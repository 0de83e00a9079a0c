"""Training and evaluation on mmengine's Runner: :class:`PIIPRunner`, and what it changes.

==================  ==================================================  ===============================================
part                stock mmengine                                      here
==================  ==================================================  ===============================================
resuming            starts an interrupted epoch over, restores no       continues with the next batch, and repeats the
(`resume.py`)       random state                                        losses of an uninterrupted run bit for bit
checkpoints         written in place, the old one deleted first;        appear under their name when whole, the old one
(`saving.py`)       unpickled in full if a safe reading fails           goes last; plain values, only ever read safely
losses              may be NaN, and the weights that are saved          stop the run when they are not finite, before
(`finite.py`)                                                           anything is saved
images              one that cannot be read ends in a traceback         it is named; skipped and counted if the config
(`images.py`)                                                           says `on_broken_image = "skip"`
label maps          with values beyond the classes they crash the       are named, with the value
(`labels.py`)       loss, and drop out of the metric unnoticed
several processes   needs CUDA                                          gloo where there is no CUDA device
mixed precision     needs CUDA, scales the loss, and computes boxes     bfloat16 for the backbone on any device,
                    in half precision                                   float32 for the rest, as in the released models
==================  ==================================================  ===============================================
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, init_dist, is_distributed, is_main_process
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn

from piip.errors import CheckpointError, OwnError, RunError
from piip.integrations.files import finish
from piip.integrations.finite import StopAtNaNHook
from piip.integrations.images import SkippedImagesHook, check_images
from piip.integrations.precision import bfloat16_backbone
from piip.integrations.process import export_slurm_ranks, random_state, settle_before_forks
from piip.integrations.resume import ExactResumeHook, ResumableEpochLoop, ResumableIterLoop
from piip.integrations.saving import WholeCheckpointHook, install_safe_loading

install_safe_loading()


def start_distributed(launcher: str, env_cfg: Mapping[str, Any]) -> None:
    """Join the other processes of this run, if there are any; a second call does nothing.

    With CUDA this is mmengine's own start. mmengine selects a CUDA device even for gloo, so without CUDA the process
    group is made here.

    Args:
        launcher: `none`, `pytorch` (torchrun) or `slurm`; with CUDA also `mpi`.
        env_cfg: The config's `env_cfg`: `mp_cfg` and `dist_cfg` (backend, timeout in seconds).

    Raises:
        RunError: More processes than devices, or a launcher that needs CUDA.
    """
    if launcher == "none" or is_distributed():
        return
    settle_before_forks()
    # Before init_dist, which would otherwise settle for the slow `spawn`.
    set_multi_processing(**env_cfg.get("mp_cfg", {}), distributed=True)
    dist_cfg = dict(env_cfg.get("dist_cfg", {}))
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        if local_rank >= torch.cuda.device_count():
            raise OwnError(
                f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs"
            )
        init_dist(launcher, **dist_cfg)
        return
    if launcher == "slurm":
        export_slurm_ranks()
    elif launcher != "pytorch":
        raise RunError(f"--launcher {launcher} needs CUDA devices; on CPUs use pytorch (tools/dist_train.sh) or slurm")
    timeout = datetime.timedelta(seconds=dist_cfg.get("timeout", 1800))
    torch.distributed.init_process_group("gloo", timeout=timeout)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Forward passes of the backbone in bfloat16; all else, parameters and the optimizer too, stays in float32.

    mmengine's AmpOptimWrapper needs CUDA and scales the loss, which the range of bfloat16 makes superfluous.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Surround one forward pass: gradient accumulation as in the base class, and the backbone's precision."""
        with super().optim_context(model), bfloat16_backbone(model):
            yield


@contextmanager
def explained_mismatch(filename: str) -> Iterator[None]:
    """Turn mmengine's list of all weights that do not fit into one line.

    Raises:
        CheckpointError: The weights of the file, which are loaded strictly inside, do not fit the model.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CheckpointError) or "do not match exactly" not in str(error):
            raise
        details = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        shown = "; ".join(line if len(line) < 200 else f"{line[:200]} ..." for line in details[:3])
        more = f" (and {len(details) - 3} more)" if len(details) > 3 else ""
        raise CheckpointError(f"{filename} does not fit the model of this config: {shown}{more}") from error


_LOOPS = {"EpochBasedTrainLoop": ResumableEpochLoop, "IterBasedTrainLoop": ResumableIterLoop}


@RUNNERS.register_module()
class PIIPRunner(Runner):
    """mmengine's Runner with the loops, hooks and loading of this module (`runner_type = "PIIPRunner"`)."""

    random_states: list[dict[str, Any]]
    """Of every process, by rank; taken when a checkpoint is saved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        skipped = str(Path(self.log_dir, "skipped_images.txt"))
        choices = {"train": {"on_broken": self.cfg.get("on_broken_image", "stop"), "record": skipped}}
        for name in ("train", "val", "test"):
            loader = f"_{name}_dataloader"  # a config until it is first needed
            config = check_images(getattr(self, loader), **choices.get(name, {}))
            if self.cfg.get("default_scope") == "mmseg":
                from piip.integrations.labels import check_labels

                config = check_labels(config, self.cfg.model)
            setattr(self, loader, config)
        self.register_hook(SkippedImagesHook(skipped))

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Start the processes our way first; mmengine then finds them started."""
        start_distributed(self._launcher, env_cfg)
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Without CUDA, wrap for gloo: no device ids, and no SyncBN, which has no CPU kernel."""
        if self.distributed and not torch.cuda.is_available():
            if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
                self.logger.warning("SyncBN has no CPU kernel: every process normalises its own batch instead")
                model = revert_sync_batchnorm(model)
            defaults = {
                "type": "MMDistributedDataParallel",
                "broadcast_buffers": False,
                "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
            }
            model_wrapper_cfg = {**defaults, **(model_wrapper_cfg or {}), "device_ids": None}
        return super().wrap_model(model_wrapper_cfg, model)

    def register_hooks(
        self, default_hooks: dict[str, Any] | None = None, custom_hooks: list[Any] | None = None
    ) -> None:
        """Put our CheckpointHook in place of mmengine's, and add our other hooks."""
        hooks = dict(default_hooks or {})
        checkpoint = hooks.get("checkpoint", {"type": "CheckpointHook", "interval": 1})
        if isinstance(checkpoint, dict) and checkpoint["type"] == "CheckpointHook":
            hooks["checkpoint"] = {**checkpoint, "type": WholeCheckpointHook}
        super().register_hooks(hooks, [*(custom_hooks or []), ExactResumeHook(), StopAtNaNHook()])

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """Build the resumable loop in place of each of mmengine's two."""
        if isinstance(loop, dict):
            loop = dict(loop)
            if "type" not in loop:
                loop["type"] = "EpochBasedTrainLoop" if loop.pop("by_epoch") else "IterBasedTrainLoop"
            if loop["type"] in _LOOPS:
                loop["type"] = _LOOPS[loop["type"]]
        return super().build_train_loop(loop)

    def dump_config(self) -> None:
        """Write the config to the work dir, or, when evaluating, beside the log: the training's stays as it is."""
        if self._train_loop is not None:
            super().dump_config()
        elif is_main_process():
            self.cfg.dump(str(Path(self.log_dir, "config.py")))

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint that appears under its name when it is whole. Every process has to call this."""
        self.random_states = all_gather_object(random_state())
        part = filename + ".part"
        super().save_checkpoint(out_dir, part, *args, **kwargs)
        if is_main_process():
            finish(Path(out_dir, part), Path(out_dir, filename))

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Load weights; to resume or to evaluate, all of them (mmengine would only log what is missing).

        Raises:
            CheckpointError: The file cannot be read, or does not fit the model.
        """
        strict = strict or self._resume or self._train_loop is None
        with explained_mismatch(filename):
            return super().load_checkpoint(filename, map_location, strict, **kwargs)
