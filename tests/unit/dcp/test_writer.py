"""The storage writer's plans: no two ranks may write files of one name."""

from __future__ import annotations

import inspect

import pytest
from torch.distributed.checkpoint.planner import SavePlan

from mpreader.dcp.writer import S3StorageWriter


def test_ranks_that_save_without_a_common_plan_keep_their_own_prefixes() -> None:
    writer = S3StorageWriter("us-east-1", "s3://bucket/checkpoint")
    if "kwargs" not in inspect.signature(writer.set_up_storage_writer).parameters:
        pytest.skip("this torch has no saves without a common plan")
    prefixes = []
    for rank in range(3):
        writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
        # Each rank plans for itself: the global plan that it makes is of its own plan only.
        [plan] = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan([]))])
        prefixes.append(plan.storage_data.prefix)
    assert prefixes == ["__0_", "__1_", "__2_"]
