"""Training under DeepSpeed: :class:`ZeRORunner`, which shares parameters, gradients and optimizer out over processes.

mmengine has a strategy and a second runner for DeepSpeed. They would lose everything that :class:`PIIPRunner` is for
(exact resume, whole checkpoints, safe reading, the stop at NaN), and their checkpoints are unpickled in full. Here the
runner stays, with its loops and hooks; the engine takes the place of DistributedDataParallel and of the optimizer step.

A checkpoint is a folder in DeepSpeed's own format. `piip.checkpoint.read_file` reads it in one process, whatever wrote
it, without DeepSpeed and without unpickling; to resume takes the same ZeRO stage and as many processes.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_gather_object, barrier, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS, OPTIM_WRAPPERS, RUNNERS
from torch import Tensor, nn

from piip.checkpoint import read_file
from piip.errors import CheckpointError, RunError, unknown
from piip.integrations.files import finish
from piip.integrations.precision import backbone_of, compute_in_float32
from piip.integrations.resume import random_state
from piip.integrations.runtime import BFloat16OptimWrapper, PIIPRunner
from piip.shards import WHOLE

PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
}
"""What `deepspeed = "zero1"` in a config and `--deepspeed zero1` mean: 1 shares out the optimizer, 2 gradients too, 3
parameters too."""


def deepspeed_config(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's settings from what a config or command line holds.

    Args:
        value: A name from `PRESETS`, the path of a DeepSpeed JSON file, or its content.

    Raises:
        RunError: No such preset or file, or the file holds no settings of ZeRO.
    """
    if isinstance(value, str):
        if value in PRESETS:
            return copy.deepcopy(PRESETS[value])
        path = Path(value)
        if not path.is_file():
            raise RunError(f"deepspeed: {unknown('preset', value, PRESETS)}, or the path of a DeepSpeed JSON file")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"deepspeed: {path} is not JSON: {error}") from error
    config = json.loads(json.dumps(value)) if isinstance(value, Mapping) else {}
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise RunError(
            f"deepspeed: zero_optimization.stage is {stage!r}, it must be 1, 2 or 3 (or leave deepspeed out)"
        )
    if config.get("fp16", {}).get("enabled"):
        raise RunError(
            "deepspeed: float16 is not supported, its loss scale would be lost in a resume: use bf16 (--amp)"
        )
    if "optimizer" in config or "scheduler" in config:
        raise RunError(
            "deepspeed: optimizer and scheduler are those of the config; take them out of DeepSpeed's settings"
        )
    return config


@OPTIM_WRAPPERS.register_module()
class ZeROOptimWrapper(OptimWrapper):
    """The optimizer as DeepSpeed's engine steps it: it scales, accumulates and clips gradients by itself."""

    engine: Any

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Leave the loss: the engine divides it by the steps it accumulates."""
        return loss

    def should_update(self) -> bool:
        """Let the engine count: it is asked for a step each time."""
        return True

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradients of a loss."""
        self.engine.backward(loss)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Step, and log the norm of the gradients where they are clipped."""
        self.engine.step()
        if self.clip_grad_kwargs and (norm := self.engine.get_global_grad_norm()) is not None:
            self.message_hub.update_scalar("train/grad_norm", float(norm))

    def zero_grad(self, **kwargs: Any) -> None:
        """Do nothing: the engine clears gradients after a step."""


@MODEL_WRAPPERS.register_module()
class ZeROModel:
    """DeepSpeed's engine around a model of mmengine, called as mmengine calls models."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Train on one batch and return its losses."""
        loss, losses = self.module.parse_losses(self._run(data, training=True, mode="loss"))
        optim_wrapper.update_params(loss)
        return losses

    def val_step(self, data: Any) -> list[Any]:
        """Predict for one batch."""
        return self._run(data, training=False, mode="predict")

    test_step = val_step

    def _run(self, data: Any, training: bool, mode: str) -> Any:
        data = self.module.data_preprocessor(data, training)
        model = self.engine if training else self.module
        return model(**data, mode=mode) if isinstance(data, dict) else model(*data, mode=mode)


class _GatheringHooks:
    """The hooks by which ZeRO-3 gathers the parameters of a module when it is called.

    All processes have to gather the same parameters in the same order, and the engine gathers ahead along the calls of
    the step before. Detectors do not keep to that: a level of the pyramid without proposals has its RoIAlign left out,
    an image without detections the mask head.

    Args:
        model: The model, before the engine starts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables = [
            (table, set(table), not any(True for _ in module.parameters()))
            for module in model.modules()
            for table in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._lifted: list[tuple[dict, dict]] = []

    def drop_needless(self) -> None:
        """Take them from modules without parameters, whose calls may differ between the processes."""
        for table, before, without_parameters in self._tables:
            if without_parameters:
                for key in set(table) - before:
                    del table[key]

    def lift(self) -> None:
        """Take them from all modules, until :meth:`restore`."""
        for table, before, _ in self._tables:
            self._lifted.append((table, {key: table.pop(key) for key in list(table) if key not in before}))

    def restore(self) -> None:
        """Put them back."""
        while self._lifted:
            table, hooks = self._lifted.pop()
            table.update(hooks)


class WholeParametersHook(Hook):
    """Keeps the parameters that ZeRO-3 shares out whole while a run is validated.

    Args:
        model: The engine's model.
        hooks: Of the engine, in it.
    """

    priority = "VERY_HIGH"

    def __init__(self, model: nn.Module, hooks: _GatheringHooks) -> None:
        self._model, self._hooks, self._region = model, hooks, ExitStack()

    def before_val(self, runner: Any) -> None:
        """Gather them."""
        import deepspeed

        self._hooks.lift()
        self._region.callback(self._hooks.restore)
        # Small ones stay whole: the engine would not expect to find them shared out.
        parameters: list[Any] = [*self._model.parameters()]
        shares = [parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"]
        self._region.enter_context(deepspeed.zero.GatheredParameters(shares))

    def after_val(self, runner: Any) -> None:
        """Share them out again."""
        self._region.close()


def _gather_alone() -> None:
    """Make a group of this process alone, which the engine needs as well."""
    if not is_distributed():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


@contextmanager
def _scalars_allowed(model: nn.Module, stage: int) -> Iterator[None]:
    """Let an engine start over a model with scalar parameters, which it fails to send to the other processes.

    They have the same values there already: mmengine sends those of the first process when it initialises a model.
    """
    scalars: list[Any] = [parameter for parameter in model.parameters() if not parameter.ndim]
    for parameter in scalars:
        if stage < 3:
            parameter.ds_optim_param = True  # is not sent
        else:
            parameter.data = parameter.data.reshape(1)
    yield
    for parameter in scalars:
        if stage < 3:
            del parameter.ds_optim_param
        else:
            parameter.ds_shape = torch.Size()  # what it is gathered to


def _keep_statistics(model: nn.Module, leave_out: nn.Module) -> None:
    """Bring buffers behind the backbone (running statistics) back to float32, which the engine has taken them from."""
    left = {id(buffer) for buffer in leave_out.buffers()}
    for buffer in model.buffers():
        if id(buffer) not in left and buffer.dtype == torch.bfloat16:
            buffer.data = buffer.data.float()


@RUNNERS.register_module()
class ZeRORunner(PIIPRunner):
    """PIIP's runner with DeepSpeed's engine; `cfg.deepspeed` holds its settings, see `deepspeed_config`.

    With a BFloat16OptimWrapper (`--amp`), or `bf16=dict(enabled=True)` in the settings, parameters are in bfloat16 and
    the optimizer keeps float32 ones; what follows the backbone computes in float32. Otherwise all is float32. Batch
    size, accumulation and clipping are those of the config (`train_dataloader.batch_size`,
    `optim_wrapper.accumulative_counts`, `optim_wrapper.clip_grad`).
    """

    model: Any

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Move the model to its device; the engine comes when its weights are there."""
        return revert_sync_batchnorm(model).to(get_device())

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Build the config's optimizer for the engine.

        Raises:
            RunError: The wrapper or the clipping is none that the engine knows.
        """
        if not isinstance(optim_wrapper, dict):
            return super().build_optim_wrapper(optim_wrapper)
        settings = dict(optim_wrapper)
        kind = settings.get("type", OptimWrapper)
        kind = OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind
        self._bf16 = kind is BFloat16OptimWrapper
        if kind in (OptimWrapper, BFloat16OptimWrapper):
            kind = ZeROOptimWrapper
        if not (isinstance(kind, type) and issubclass(kind, ZeROOptimWrapper)):
            raise RunError(
                f"DeepSpeed does not work with optim_wrapper.type {optim_wrapper['type']}: use OptimWrapper, "
                "with --amp for bfloat16"
            )
        clip = settings.get("clip_grad") or {}
        if clip.get("type", "norm") != "norm" or clip.get("norm_type", 2) != 2:
            raise RunError(f"DeepSpeed clips gradients by their L2 norm only, not with optim_wrapper.clip_grad {clip}")
        return super().build_optim_wrapper({**settings, "type": kind})

    def load_or_resume(self) -> None:
        """Load weights into the plain model and start the engine, or start it and resume."""
        if self._resume:
            self._start_engine()
        super().load_or_resume()
        if not self._resume:
            self._start_engine()

    def _start_engine(self) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        _gather_alone()
        wrapper: ZeROOptimWrapper = self.optim_wrapper
        config = {
            "train_micro_batch_size_per_gpu": self.train_dataloader.batch_sampler.batch_size,
            "gradient_accumulation_steps": wrapper._accumulative_counts,
            "gradient_clipping": float((wrapper.clip_grad_kwargs or {}).get("max_norm", 0.0)),
            "bf16": {"enabled": self._bf16},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            **deepspeed_config(self.cfg.deepspeed),
        }
        model = self.model
        preprocess = copy.deepcopy(model.data_preprocessor)  # images are normalised in float32
        backbone = backbone_of(model)
        if config["bf16"].get("enabled"):
            # Within the model: the engine ends regions that begin outside it.
            if backbone is None:
                model.forward = torch.autocast(torch.device(get_device()).type, torch.bfloat16)(model.forward)
            else:
                backbone.compute_dtype = torch.bfloat16
                compute_in_float32(model, leave_out=backbone)
        stage = config["zero_optimization"]["stage"]
        hooks = _GatheringHooks(model)
        with _scalars_allowed(model, stage):
            engine, *_ = deepspeed.initialize(model=model, optimizer=wrapper.optimizer, config=config)
        if stage == 3:
            hooks.drop_needless()
            self.register_hook(WholeParametersHook(model, hooks))
        engine.module.data_preprocessor = preprocess
        if backbone is not None:
            _keep_statistics(model, leave_out=backbone)
        engine.checkpoint_engine.load = _safe_loading(engine.optimizer)
        wrapper.engine = engine
        self.model = ZeROModel(engine)

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict[str, Any] | None = None,
        by_epoch: bool = True,
        **_: Any,
    ) -> None:
        """Save a checkpoint folder that appears under its name when it is whole. Every process has to call this."""
        self.random_states = all_gather_object(random_state())
        step = {"epoch": self.epoch + by_epoch, "iter": self.iter + (not by_epoch)}
        run = {"seed": self.seed, "experiment_name": self.experiment_name, "cfg": self.cfg.pretty_text}
        data = {"dataset_meta": getattr(self.train_dataloader.dataset, "metainfo", None)}
        content = {"meta": {**step, **(meta or {}), **run, **data}, "message_hub": self.message_hub.state_dict()}
        if self.param_schedulers is not None:
            content["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=content)
        part, path = Path(out_dir, filename + ".part"), Path(out_dir, filename)
        if is_main_process() and part.exists():
            shutil.rmtree(part)
        barrier()
        self.model.save_checkpoint(out_dir, tag=part.name, client_state=content, save_latest=False)
        barrier()
        if is_main_process():
            finish(part, path)
        barrier()

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Load weights into the plain model; to resume, the engine's whole state.

        Raises:
            CheckpointError: The checkpoint cannot be read, or was not written by this engine.
        """
        if not self._resume:
            return super().load_checkpoint(filename, map_location, strict, **kwargs)
        path = Path(filename)
        _check_resumable(path, self.model.bfloat16_enabled(), self.model.zero_optimization_stage())
        _, content = self.model.load_checkpoint(str(path.parent), tag=path.name)
        content["meta"].pop("config", None)
        self.call_hook("after_load_checkpoint", checkpoint=content)
        self._has_loaded = True
        return content


def _check_resumable(path: Path, bf16: bool, stage: int) -> None:
    """Check that a folder was written as this run would write one.

    Raises:
        CheckpointError: By another number of processes, in another precision or stage, or it is a file.
    """
    remedy = "or start a new run from its weights with --load-from"
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file, and DeepSpeed resumes from folders that it wrote: resume without DeepSpeed, {remedy}"
        )

    def form(processes: int, bf16: bool, sharded: bool) -> str:
        return f"{processes} processes in {'bfloat16' if bf16 else 'float32'} under ZeRO-{'3' if sharded else '1 or 2'}"

    written = [file.name for file in path.glob("*_optim_states.pt")]
    there = form(len(written), any(name.startswith("bf16_") for name in written), not (path / WHOLE).is_file())
    here = form(torch.distributed.get_world_size(), bf16, stage == 3)
    if there != here:
        raise CheckpointError(f"{path} is of {there}, this run of {here}: resume with the same, {remedy}")


def _safe_loading(optimizer: Any) -> Callable[..., Any]:
    """Return how the engine reads its files, without executing anything in them; it would unpickle them in full."""

    def load(path: str, map_location: Any = None, **_: Any) -> Any:
        place = str(map_location) if isinstance(map_location, (str, torch.device)) else "cpu"  # or a function: the CPU
        content = read_file(path, map_location=place)
        if "loss_scaler" in content.get("optimizer_state_dict", {}):  # an object, and without state unless in float16
            content["optimizer_state_dict"]["loss_scaler"] = optimizer.loss_scaler
        return content

    return load
