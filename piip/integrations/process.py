"""What a training program needs of its process: random numbers, workers that end, its place among others."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of every random generator that training draws from, as tensors and plain numbers.

    Covers Python, NumPy (its global generator), torch on CPU, and this process's CUDA device if there is one.
    """
    _, words, gauss = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": gauss,
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy_rest": (int(numpy["state"]["pos"]), int(numpy["has_gauss"]), float(numpy["gauss"])),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    random.setstate((3, tuple(state["python"].tolist()), state["python_gauss"]))
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_rest"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Draw everything inside from the given non-negative numbers, and leave the CPU random states as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(8)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:6])
    # Not torch.manual_seed: it would seed CUDA as well, whose state belongs to the model.
    torch.default_generator.manual_seed(int(words[6]) << 31 | int(words[7]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@cache
def settle_before_forks() -> None:
    """From now on, let the threads of the process group come to rest before this process forks a data worker.

    Before Python 3.12 (and 3.11.8), a fork that falls into the moment in which another thread enters the interpreter
    leaves a worker that waits for ever (python/cpython#112275). The threads of gloo and NCCL do so just after a
    collective, when they release the last reference to a tensor: at the end of an epoch, that is when workers start.
    """
    if sys.version_info < (3, 12) and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=partial(time.sleep, 0.05))  # long for a thread, short beside the start of a worker


def end_with_parent(parent: int, then: Callable[[int], None] | None, worker: int) -> None:
    """Let a worker process end when the training process is killed, then initialise it.

    A worker notices by itself that its parent is gone, but cannot end while a batch that nobody will read waits in its
    pipe: it would stay behind, with its memory.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # killed before the line above
            os._exit(1)
    if then is not None:
        then(worker)


def export_slurm_ranks() -> None:
    """Give torch the place of this process in a Slurm job, where it looks for it."""
    if "MASTER_ADDR" not in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_NODELIST"]]
        os.environ["MASTER_ADDR"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[
            0
        ]
    os.environ.setdefault("MASTER_PORT", "29500")
    for ours, theirs in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
        os.environ[ours] = os.environ[f"SLURM_{theirs}"]
