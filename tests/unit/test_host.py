"""Limits of control groups, as their files tell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpreader.host import Cgroup


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{path}": files[path] for path in files}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def memory_v2(folder: str, limit: str, used: int = 0, cache: int = 0) -> dict[str, str]:
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


V2 = {"cgroup.controllers": "cpu memory\n"}


V1_MEMORY = {
    "memory/docker/x/memory.limit_in_bytes": "1000\n",
    "memory/docker/x/memory.usage_in_bytes": "300\n",
    "memory/docker/x/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {**V2, "cpu.max": "max 100000\n", **memory_v2("", "max\n")}, Cgroup(2)),
        (
            "0::/\n",
            {**V2, "cpu.max": "150000 100000\n", **memory_v2("", "1000\n", 300, 100)},
            Cgroup(2, 1.5, 1000, 800),
        ),
        (  # a group above is tighter
            "0::/slurm/job/step\n",
            {
                **V2,
                **memory_v2("slurm/job/", "900\n", 100),
                **memory_v2("slurm/job/step/", "max\n"),
                "slurm/cpu.max": "2 1",
            },
            Cgroup(2, 2.0, 900, 800),
        ),
        (  # a container whose path is that of the host
            "3:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
            {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n", **V1_MEMORY},
            Cgroup(1, 2.5, 1000, 800),
        ),
        (  # version 1 without limits, and one of version 2 besides it without controllers
            "4:memory:/\n1:cpu:/\n0::/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "5\n",
                "memory/memory.stat": "",
            },
            Cgroup(1),
        ),
        ("0::/../..\n", {**V2, "cpu.max": "1 2\n"}, Cgroup(2, 0.5)),
        ("", {"cgroup": ""}, Cgroup(0)),
    ],
    ids=["v2", "v2 limits", "v2 nested", "v1 limits", "v1", "namespace", "none"],
)
def test_limits_of_control_groups_are_read(
    tmp_path: Path, groups: str, files: dict[str, str], expected: Cgroup
) -> None:
    assert Cgroup.of(tree(tmp_path, groups, files)) == expected


def test_a_host_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert Cgroup.of(tmp_path) == Cgroup(0)
