"""Ranks of a host, by the variables that each launcher sets, also inside of each other; nonsense is ignored."""

from __future__ import annotations

import pytest

from mpreader.ranks import Ranks, global_rank, local_ranks

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    "name",
    [
        "LOCAL_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "JSM_NAMESPACE_LOCAL_SIZE",
        "PALS_LOCAL_SIZE",
        "PMI_LOCAL_SIZE",
        "HOROVOD_LOCAL_SIZE",
    ],
)
def test_ranks_of_a_launcher_are_known(name: str) -> None:
    assert local_ranks({name: "8"}) == Ranks(8, name)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(1, "")),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4"}, Ranks(4, "SLURM_STEP_TASKS_PER_NODE")),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,2(x2),1"}, Ranks(2, "SLURM_STEP_TASKS_PER_NODE")),
        ({**STEP, "SLURM_NODEID": "3", "SLURM_TASKS_PER_NODE": "2(x3),1"}, Ranks(1, "SLURM_TASKS_PER_NODE")),
        ({**STEP, "SLURM_NODEID": "9", "SLURM_TASKS_PER_NODE": "2(x3),1"}, Ranks(2, "SLURM_TASKS_PER_NODE")),
        ({**STEP, "SLURM_NTASKS_PER_NODE": "8"}, Ranks(8, "SLURM_NTASKS_PER_NODE")),
        # `srun -n1` in a job of many tasks
        (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_TASKS_PER_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"},
            Ranks(1, "SLURM_STEP_TASKS_PER_NODE"),
        ),
        # the batch script, salloc's shell, and the step of a batch script as such
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0"}, Ranks(1, "")),
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_JOB_ID": "7"}, Ranks(1, "")),
        ({**STEP, "SLURM_STEP_ID": "4294967291", "SLURM_TASKS_PER_NODE": "8"}, Ranks(1, "")),
        ({**STEP, "SLURM_STEP_ID": "batch", "SLURM_TASKS_PER_NODE": "8"}, Ranks(1, "")),
        # launchers inside of a step: the innermost counts
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "4"}, Ranks(4, "LOCAL_WORLD_SIZE")),
        (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "OMPI_COMM_WORLD_LOCAL_SIZE": "6"},
            Ranks(6, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ),
        ({"LOCAL_SIZE": "4", "LOCAL_RANK": "3"}, Ranks(4, "LOCAL_SIZE")),
        ({"LOCAL_SIZE": "4"}, Ranks(1, "")),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "7", "FLUX_JOB_NNODES": "2"}, Ranks(4, "FLUX_JOB_SIZE")),
        ({"FLUX_JOB_SIZE": "7", "FLUX_JOB_NNODES": "2"}, Ranks(1, "")),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "7", "FLUX_JOB_NNODES": "0"}, Ranks(1, "")),
    ],
)
def test_ranks_are_those_of_the_innermost_launcher(environment: dict[str, str], expected: Ranks) -> None:
    assert local_ranks(environment) == expected


@pytest.mark.parametrize(
    "value", ["", "0", "-1", "two", "1.5", "٣", "0x4", "4 4", "999999", "9" * 5000, "2(x9999999999)", "1_0", "+4"]
)
def test_values_that_make_no_sense_count_as_not_set(value: str) -> None:
    assert local_ranks({"LOCAL_WORLD_SIZE": value, "MPI_LOCALNRANKS": "2"}) == Ranks(2, "MPI_LOCALNRANKS")
    assert local_ranks({"LOCAL_WORLD_SIZE": value}) == Ranks(1, "")
    assert local_ranks({**STEP, "SLURM_NTASKS_PER_NODE": value}).number == 1
    assert local_ranks({**STEP, "SLURM_STEP_TASKS_PER_NODE": f"2,{value}"}).number in (1, 2)
    assert global_rank({"RANK": value}) in (0, 999999)


@pytest.mark.parametrize(
    "name",
    [
        "RANK",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
        "MV2_COMM_WORLD_RANK",
        "JSM_NAMESPACE_RANK",
        "PALS_RANKID",
        "HOROVOD_RANK",
        "FLUX_TASK_RANK",
        "PMIX_RANK",
    ],
)
def test_number_of_a_rank_is_known(name: str) -> None:
    assert global_rank({name: "3"}) == 3


def test_number_of_a_rank_under_slurm_is_that_of_its_step() -> None:
    assert global_rank(STEP) == 5
    assert global_rank({"SLURM_PROCID": "5"}) == 0, "a shell of the job, which is alone"
    assert global_rank({**STEP, "RANK": "2"}) == 2
    assert global_rank({}) == 0
