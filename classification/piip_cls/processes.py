"""This process among the others of a run."""

import argparse
import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from piip.errors import OwnError
from piip.integrations.process import export_slurm_ranks, settle_before_forks

CPU = torch.device("cpu")
SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE")
SET_BY_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODELIST")


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: Its number.
        count: How many there are.
        device: Where it computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of every process's values."""
        if self.count > 1:
            values = values.to(self.device if distributed.get_backend() == "nccl" else "cpu")
            distributed.all_reduce(values)
        return values.cpu()

    def gather(self, rows: Tensor) -> Tensor:
        """Return every process's rows `(N, ...)`, one process after the other; each may have another number of them."""
        if self.count == 1:
            return rows
        parts: list[Tensor] = [rows] * self.count
        distributed.all_gather_object(parts, rows.cpu())
        return torch.cat(parts)

    def wait(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            distributed.barrier()


def join(args: argparse.Namespace) -> Processes:
    """Join the other processes of the run, if there are any; started by torchrun, Slurm or alone.

    Raises:
        RunError: There is no GPU for this process, or the launcher that `--launcher` names did not start it.
    """
    if args.launcher == "pytorch":
        _check_started("pytorch", SET_BY_TORCHRUN, "torchrun or sh dist_train.sh")
    if args.launcher == "slurm":
        _check_started("slurm", SET_BY_SLURM, "srun or sh slurm_train.sh")
        export_slurm_ranks()
    rank, count, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise OwnError(
                f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; start as many "
                "processes as there are GPUs, or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if count > 1 and not distributed.is_initialized():
        settle_before_forks()
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Processes(rank, count, device)


def _check_started(launcher: str, names: tuple[str, ...], how: str) -> None:
    if missing := [name for name in names if name not in os.environ]:
        raise OwnError(
            f"--launcher {launcher}, and the environment has no {' and no '.join(missing)}: start with {how}, or leave "
            "--launcher out"
        )
