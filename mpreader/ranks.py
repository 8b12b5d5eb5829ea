"""Ranks of a job: the number of its processes on this host, and that of this one, by the launcher's variables.

Only reads the environment. :mod:`mpreader.host` divides the host by the number of ranks, and the progress bar is shown
by the first one only.

The launchers set variables of their own. Where several do, the innermost launcher counts, the one that started this
very process: torchrun within a Slurm step, Open MPI within a Slurm job. That is the order of the table below. Slurm
comes last, since its variables are inherited by everything that runs within a job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["Ranks", "global_rank", "local_rank", "local_ranks"]

_MOST_RANKS: Final = 4096  # of one host; a larger number is none of a launcher, and ignored

# In order of precedence.
_LOCAL_SIZES: Final = (
    "LOCAL_WORLD_SIZE",  # torchrun, Ray Train, Accelerate
    "OMPI_COMM_WORLD_LOCAL_SIZE",  # Open MPI, PRRTE
    "MPI_LOCALNRANKS",  # MPICH, Intel MPI (Hydra)
    "MV2_COMM_WORLD_LOCAL_SIZE",  # MVAPICH
    "JSM_NAMESPACE_LOCAL_SIZE",  # IBM jsrun, Spectrum MPI
    "PALS_LOCAL_SIZE",  # Cray PALS
    "PMI_LOCAL_SIZE",  # Cray PMI
    "HOROVOD_LOCAL_SIZE",
)
_GLOBAL_RANKS: Final = (
    "RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_RANK",
    "PALS_RANKID",
    "HOROVOD_RANK",
    "FLUX_TASK_RANK",
    "PMIX_RANK",
)
_LOCAL_RANKS: Final = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "PMI_LOCAL_RANK",
    "HOROVOD_LOCAL_RANK",
    "FLUX_TASK_LOCAL_ID",
)
# The job's steps count from 0; the batch script itself, and what is no step, have numbers from here on.
_FIRST_SPECIAL_STEP: Final = 0xFFFF_FFF0
_SLURM_GROUP: Final = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")


class Ranks(NamedTuple):
    """Number of ranks of a job that share this host, and where it was found.

    Attributes:
        number: Number of ranks, this process included; 1 if no launcher tells.
        source: Environment variable that tells; empty if none does.
    """

    number: int
    source: str


def local_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Return the number of ranks that share this host; a value that makes no sense counts as one that is not set.

    Args:
        environment: Environment variables. None: those of the process.
    """
    environment = os.environ if environment is None else environment
    for name in _LOCAL_SIZES:
        count = _number(environment.get(name))
        if 1 <= count <= _MOST_RANKS:
            return Ranks(count, name)
    for ranks in (_deepspeed(environment), _flux(environment), _slurm(environment)):
        if 1 <= ranks.number <= _MOST_RANKS:
            return ranks
    return Ranks(1, "")


def global_rank(environment: Mapping[str, str] | None = None) -> int:
    """Return the number of this process among all ranks of its job; 0 if no launcher tells.

    Args:
        environment: Environment variables. None: those of the process.
    """
    environment = os.environ if environment is None else environment
    for name in _GLOBAL_RANKS:
        rank = _number(environment.get(name))
        if rank >= 0:
            return rank
    return max(0, _number(environment.get("SLURM_PROCID"))) if _is_slurm_task(environment) else 0


def local_rank(environment: Mapping[str, str] | None = None) -> int | None:
    """Return the number of this process among the ranks on its host; None if no launcher tells.

    Args:
        environment: Environment variables. None: those of the process.
    """
    environment = os.environ if environment is None else environment
    for name in _LOCAL_RANKS:
        rank = _number(environment.get(name))
        if rank >= 0:
            return rank
    rank = _number(environment.get("SLURM_LOCALID")) if _is_slurm_task(environment) else -1
    return rank if rank >= 0 else None


def _number(text: str | None) -> int:
    """Return the whole number that a text says; -1 if it says none."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text.strip()) else -1


def _deepspeed(environment: Mapping[str, str]) -> Ranks:
    # A name that others may use for something else: counted only where the launcher's number of the rank fits.
    count = _number(environment.get("LOCAL_SIZE"))
    is_rank = 0 <= _number(environment.get("LOCAL_RANK")) < count
    return Ranks(count if is_rank else -1, "LOCAL_SIZE")


def _flux(environment: Mapping[str, str]) -> Ranks:
    if _number(environment.get("FLUX_TASK_RANK")) < 0:
        return Ranks(-1, "")
    size, nodes = _number(environment.get("FLUX_JOB_SIZE")), _number(environment.get("FLUX_JOB_NNODES"))
    return Ranks(-(-size // nodes) if nodes > 0 else -1, "FLUX_JOB_SIZE")


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    """True if this process belongs to a step that srun has started, not to the batch script or to salloc's shell.

    These have the job's variables, too, and are one process, however many tasks the job has asked for.
    """
    step = _number(environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID")))
    return 0 <= step < _FIRST_SPECIAL_STEP and _number(environment.get("SLURM_PROCID")) >= 0


def _slurm(environment: Mapping[str, str]) -> Ranks:
    if not _is_slurm_task(environment):
        return Ranks(-1, "")
    # The step's number comes first: `srun -n1` in a job of many tasks is one process.
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        count = _of_node(environment.get(name, ""), _number(environment.get("SLURM_NODEID")))
        if 1 <= count <= _MOST_RANKS:
            return Ranks(count, name)
    return Ranks(-1, "")


def _of_node(text: str, node: int) -> int:
    """Return the number of tasks of a node, out of a list such as ``"2(x3),1"``: three nodes with 2, one with 1.

    Returns:
        The number of the node; the largest of all if the list ends before it, or if it is not known (-1); -1 if the
        text is no such list.
    """
    first, largest = 0, -1
    for group in text.strip().split(","):
        match = _SLURM_GROUP.fullmatch(group)
        if match is None:
            return -1
        count, nodes = int(match[1]), int(match[2] or 1)
        if first <= node < first + nodes:
            return count
        first, largest = first + nodes, max(largest, count)
    return largest
