"""Exact resume: a continued run repeats the losses of an uninterrupted one, bit for bit.

mmengine starts an interrupted epoch over, gives every worker the same random numbers in each epoch, and restores no
random state. Here, three rules make a run independent of where it was interrupted:

- A sample's augmentation depends on (seed, epoch, index) and nothing else, in whichever process it is loaded.
- Loading data and validating leave the random state of the training process as it was.
- That state, of every process, is part of each checkpoint; the position in the data follows from the iteration.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, LOOPS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import BatchSampler, Dataset, Sampler

from piip.errors import RunError
from piip.integrations.process import end_with_parent, random_state, seeded, set_random_state


class SeededDataset(Dataset):
    """A dataset whose augmentations depend on (seed, epoch, index) only.

    It is asked for `(epoch, index)` pairs, as :class:`PositionedBatchSampler` draws them: the epoch travels with the
    index, so that worker processes need no news of it and may be persistent. Everything else is the dataset's own.

    Args:
        dataset: The dataset, or the config of one.
        seed: First part of every sample's seed.
    """

    def __init__(self, dataset: Dataset | dict[str, Any], seed: int) -> None:
        # Past __setattr__, which writes to the dataset.
        self.__dict__["seed"] = seed
        self.__dict__["inner"] = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        epoch, index = draw
        with seeded(self.seed, epoch, index):
            return self.inner[index]

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        # Only reached for what this class lacks. Python's own look-ups (copying, pickling) must not be redirected.
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Hooks that change a dataset while training (its pipeline, say) mean the real one.
        setattr(self.inner, name, value)


class PositionedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(epoch, index)` pairs that can begin anywhere, around any batch sampler.

    Args:
        sampler: Draws the indices. Named `sampler` because mmengine's hook sets its epoch under this name.
        batch_size: Images per batch and process.
        batches: Config of the batch sampler (mmdet's grouping by aspect ratio, say). Default: consecutive indices.
        drop_last: Without `batches`, whether to leave out an incomplete last batch.
        endless: Whether to go on with the next pass after the last batch, as training by iterations needs.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        batches: dict[str, Any] | None = None,
        drop_last: bool = False,
        endless: bool = False,
    ) -> None:
        self.sampler: Any = sampler
        self.batch_size = batch_size
        self.batches: BatchSampler = (
            BatchSampler(sampler, batch_size, drop_last)
            if batches is None
            else DATA_SAMPLERS.build(batches, default_args={"sampler": sampler, "batch_size": batch_size})
        )
        self.endless = endless
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        passes = itertools.count() if self.endless else (self.epoch,)
        # Skipping draws the indices and loads nothing.
        return itertools.islice(itertools.chain.from_iterable(map(self._one_pass, passes)), self.start, None)

    def _one_pass(self, number: int) -> Iterator[list[tuple[int, int]]]:
        if self.endless and hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(number)
        rank, world_size = get_dist_info()
        size, drawn = len(self.sampler.dataset), 0
        for batch in self.batches:
            # An infinite sampler stays in its first pass for ever: there, the epoch follows from the count.
            yield [(number + (rank + (drawn + i) * world_size) // size, index) for i, index in enumerate(batch)]
            drawn += len(batch)


def _resumable(dataloader: dict[str, Any], seed: int, endless: bool) -> dict[str, Any]:
    """Return a dataloader config with its dataset and batch sampler wrapped in the two classes above."""
    if not isinstance(dataloader, dict):
        raise TypeError(f"train_dataloader must be a config (a dict), not a built {type(dataloader).__name__}")
    loader = dict(dataloader)
    loader["dataset"] = {"type": SeededDataset, "dataset": loader["dataset"], "seed": seed}
    loader["batch_sampler"] = {
        "type": PositionedBatchSampler,
        "batches": loader.get("batch_sampler"),
        "drop_last": loader.pop("drop_last", False),
        "endless": endless,
    }
    return loader


def _settle(loop: BaseLoop) -> None:
    """Check the loop's data loader and separate its randomness from the model's."""
    if len(loop.dataloader) == 0:
        raise RunError(
            f"the training data gives no batch: {len(loop.dataloader.dataset)} images, "
            f"{loop.dataloader.batch_sampler.batch_size} per batch; check ann_file, filter_cfg and drop_last"
        )
    # Without a generator of its own, a loader draws one number from the model's each time it is iterated.
    loop.dataloader.generator = torch.Generator()
    loop.dataloader.worker_init_fn = partial(end_with_parent, os.getpid(), loop.dataloader.worker_init_fn)


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """Training by epochs; an interrupted epoch continues with its next batch instead of starting over."""

    def __init__(self, runner: Runner, dataloader: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(runner, _resumable(dataloader, runner.seed, endless=False), **kwargs)
        _settle(self)

    def run_epoch(self) -> None:
        """Train from the current position to the end of the epoch."""
        batches = self.dataloader.batch_sampler
        batches.epoch, batches.start = self._epoch, self._iter - self._epoch * len(self.dataloader)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for number, data_batch in enumerate(self.dataloader, batches.start):
            self.run_iter(number, data_batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class _PositionedIterator:
    """An iterator over an endless data loader that is created, with its workers, at the first batch."""

    def __init__(self, dataloader: Any) -> None:
        self._dataloader = dataloader
        self._iterator: Iterator[Any] | None = None

    def skip_iter(self, count: int) -> None:
        self._dataloader.batch_sampler.start = count

    def close(self) -> None:
        self._iterator = None

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._dataloader)
        return next(self._iterator)


@LOOPS.register_module()
class ResumableIterLoop(IterBasedTrainLoop):
    """Training by iterations; resuming skips to the next batch with any sampler and any number of workers."""

    def __init__(self, runner: Runner, dataloader: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(runner, _resumable(dataloader, runner.seed, endless=True), **kwargs)
        _settle(self)
        self.dataloader_iterator = _PositionedIterator(self.dataloader)

    def run(self) -> nn.Module:
        """Train, and let the workers go in the end: their data has none."""
        try:
            return super().run()
        finally:
            self.dataloader_iterator.close()


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Stores the random state of every process in each checkpoint, and continues from it.

    Validation is not repeated after a resume, so whatever it draws is given back.
    """

    priority = "VERY_HIGH"  # before the CheckpointHook, whose checkpoint of a best score is written after validation

    def __init__(self) -> None:
        self._stored: dict[str, Any] | None = None
        self._before_val: dict[str, Any] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the random states and the figures that a continuation has to agree on."""
        checkpoint["exact_resume"] = {**self._figures(runner), "random_states": runner.random_states}
        if checkpoint["meta"]["iter"] % getattr(runner.optim_wrapper, "_accumulative_counts", 1):
            runner.logger.warning(
                "this checkpoint lies between two steps of the optimizer, and gradients are not stored: resuming from "
                "it is not exact; save at multiples of accumulative_counts"
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the state until the first iteration."""
        self._stored = checkpoint.pop("exact_resume", None)

    def before_train(self, runner: Runner) -> None:
        """Check that this run can continue the stored one.

        Raises:
            RunError: Epochs or batches of this run are not those of the stored one.
        """
        if runner.iter == 0:  # new training from stored weights
            self._stored = None
        elif self._stored is None:
            runner.logger.warning("the checkpoint holds no random state (stock mmengine wrote it); losses will differ")
        else:
            self._check(runner, self._stored)

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Continue with the stored random state: the last moment before the model draws."""
        if self._stored is not None:
            states = self._stored["random_states"]
            if runner.rank < len(states):
                set_random_state(states[runner.rank])
            self._stored = None

    def before_val_epoch(self, runner: Runner) -> None:
        """Remember the state of the training."""
        self._before_val = random_state()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Return to it."""
        if self._before_val is not None:
            set_random_state(self._before_val)

    @staticmethod
    def _figures(runner: Runner) -> dict[str, int]:
        loader = runner.train_dataloader
        # The seed of the data: mmengine has changed the runner's to the stored one by now.
        own = runner.rank if runner._randomness_cfg.get("diff_rank_seed") else 0
        return {
            "seed": loader.dataset.seed - own,
            "dataset_size": len(loader.dataset),
            "batch_size": loader.batch_sampler.batch_size,
            "processes": runner.world_size,
        }

    def _check(self, runner: Runner, stored: Mapping[str, Any]) -> None:
        def step(figures: Mapping[str, Any]) -> tuple[int, int, int]:
            return figures["seed"], figures["dataset_size"], figures["batch_size"] * figures["processes"]

        here = self._figures(runner)
        if step(stored) != step(here):
            there = ", ".join(f"{key} {stored[key]} (here {value})" for key, value in here.items())
            raise RunError(
                f"the checkpoint cannot be continued, its epochs have other batches: {there}; "
                "use the same figures, or start a new run from its weights with --load-from"
            )
        if stored["processes"] != here["processes"]:
            runner.logger.warning(
                f"the checkpoint is of {stored['processes']} processes, this run has {here['processes']}: it continues "
                "at the same image, but not with the same random numbers"
            )
