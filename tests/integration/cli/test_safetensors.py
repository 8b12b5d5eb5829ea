"""``mpreader inspect``, ``load``, ``doctor`` and ``fetch`` of safetensors files, as a user calls them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import save, save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from mpreader import PoolConfig
from mpreader.config import KiB, MiB, S3ClientConfig
from mpreader.dcp import S3StorageWriter
from mpreader.formats.selection import shard_box
from mpreader.safetensors import load_checkpoint
from mpreader.testing import FaultServer, S3Server
from mpreader.tools.doctor.safetensors import safetensors_findings
from mpreader.tools.safetensors.inspection import SafetensorsSummary, describe_safetensors
from mpreader.tools.safetensors.kind import has_safetensors
from tests.integration.service import Answer, Call, Service, error, set_environment

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB, part_size=256 * KiB)
INDEX = "model.safetensors.index.json"
Run = Callable[..., subprocess.CompletedProcess[str]]


def example() -> dict[str, torch.Tensor]:
    """Tensors of several sizes, and so many of them in one file that its header takes more than one request."""
    return {
        **{f"large.{number}": torch.randn(1024, 400) for number in range(3)},
        **{f"small.{number:04} {'x' * 100}": torch.tensor([number]) for number in range(2000)},
        "bfloat16": torch.ones(300, 7, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
    }


def put(bucket: str, objects: dict[str, bytes]) -> None:
    client = boto3.client("s3")
    for key, body in objects.items():
        client.put_object(Bucket=bucket, Key=key, Body=body)
    client.close()


def index_of(parts: dict[str, dict[str, torch.Tensor]]) -> bytes:
    names = {name: file for file, part in parts.items() for name in part}
    total = sum(tensor.nbytes for part in parts.values() for tensor in part.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}).encode()


@pytest.fixture
def checkpoint(bucket: str) -> str:
    """The URI of a directory of three files with an index."""
    tensors = example()
    parts: dict[str, dict[str, torch.Tensor]] = {f"{number}.safetensors": {} for number in range(3)}
    for name, tensor in tensors.items():
        parts["0.safetensors" if "small" in name else f"{len(name) % 2 + 1}.safetensors"][name] = tensor
    files = {f"model/{file}": save(part, {"format": "pt"}) for file, part in parts.items()}
    put(bucket, {**files, f"model/{INDEX}": index_of(parts)})
    return f"s3://{bucket}/model"


def asked_for(server: S3Server, before: int, method: str) -> list[tuple[str, str | None]]:
    """Files and ranges that were asked for since there were ``before`` requests; sorted."""
    asked = [(one.path.rpartition("/")[2], one.range) for one in server.requests[before:] if one.method == method]
    return sorted((file, extent) for file, extent in asked if file.endswith(".safetensors"))


def planned(summary: SafetensorsSummary) -> list[tuple[str, str]]:
    assert summary.load is not None
    files = summary.load.files
    return sorted((file.path, f"bytes={part.start}-{part.end - 1}") for file in files for part in file.parts)


@pytest.mark.usefixtures("_asked_once")
@pytest.mark.parametrize("match", [None, ["large.[12]", "scalar"], ["small.*7 *"]])
def test_inspect_tells_the_requests_of_a_load(checkpoint: str, s3_server: S3Server, match: list[str] | None) -> None:
    summary = describe_safetensors(checkpoint, match=match, pool_config=POOL)
    names = [tensor.fqn for tensor in summary.tensors if tensor.is_selected]
    before = len(s3_server.requests)
    load_checkpoint(checkpoint, names=None if match is None else names, pool_config=POOL)
    gets = asked_for(s3_server, before, "GET")
    assert summary.load is not None
    assert len(asked_for(s3_server, before, "HEAD")) == summary.load.head_requests
    assert len(gets) == summary.load.requests + summary.load.metadata_requests
    headers = [*gets]
    for request in planned(summary):
        headers.remove(request)
    assert len({file for file, _ in headers}) == summary.load.head_requests


@pytest.mark.usefixtures("_asked_once")
@pytest.mark.parametrize("dim", [0, 1])
def test_inspect_tells_what_ranks_receive(checkpoint: str, s3_server: S3Server, dim: int) -> None:
    match = ["large.*", "bfloat16"]
    sharded = describe_safetensors(checkpoint, match=match, ranks=3, shard=dim, pool_config=POOL).sharded
    assert sharded is not None
    for rank in sharded.ranks:

        def shard(_: str, shape: tuple[int, ...], rank: int = rank.rank) -> Any:
            return tuple(slice(start, start + length) for start, length in shard_box(shape, dim, rank, 3))

        before = len(s3_server.requests)
        names = [name for name in example() if name.startswith(("large", "bfloat16"))]
        found = load_checkpoint(checkpoint, names=names, slices=shard, pool_config=POOL)
        assert sum(tensor.nbytes for tensor in found.values()) == rank.nbytes
        gets = asked_for(s3_server, before, "GET")
        extents = [re.fullmatch(r"bytes=(\d+)-(\d+)", extent or "") for _, extent in gets]
        sizes = [int(extent[2]) + 1 - int(extent[1]) for extent in extents if extent]
        assert len(gets) == rank.requests + 2, "one for the header of each file"
        header_nbytes = sum(min(256 * KiB, size) for size in sizes_of(checkpoint))
        assert sum(sizes) == rank.fetched_nbytes + header_nbytes


def sizes_of(checkpoint: str) -> list[int]:
    return [file.nbytes for file in describe_safetensors(checkpoint).files if file.path != "0.safetensors"]


def test_inspect_prints_tables_and_json(checkpoint: str, run_here: Run) -> None:
    shown = run_here("inspect", checkpoint, "--sort", "size", "--limit", "4", "--ranks", "2")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"{checkpoint}: 2,006 tensors of 4.94 MB; ")
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["large.0", "F32", "1024x400", "1.64", "MB", "1", "2.safetensors"] in rows
    assert ["format", "pt", "0.safetensors", "and", "2", "more"] in rows
    assert "A load of everything, 2,006 tensors, asks for 4.94 MB in " in shown.stdout
    assert "3 HEADs, and 4 GETs of headers." in shown.stdout
    assert "If all of them are on one host, they receive together what they need" in shown.stdout
    document = json.loads(run_here("inspect", checkpoint, "--match", "scalar", "--json").stdout)
    assert [tensor["fqn"] for tensor in document["tensors"] if tensor["is_selected"]] == ["scalar"]
    assert (document["load"]["fetched_nbytes"], document["load"]["head_requests"]) == (4, 1)
    assert "parts" not in document["load"]["files"][0]


def test_inspect_and_doctor_need_no_torch(checkpoint: str) -> None:
    program = """
import sys
sys.modules["torch"] = None
from mpreader.cli.main import main
for command in ("inspect", "doctor"):
    try:
        main([command, sys.argv[1]])
    except SystemExit as ended:
        assert ended.code == 0
"""
    done = subprocess.run([sys.executable, "-c", program, checkpoint], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{checkpoint}: 2,006 tensors of 4.94 MB; ")
    assert re.search(r"ok +safetensors +3 files with 2,006 tensors of [0-9,]+ bytes, headers are valid", done.stdout)


def test_load_says_that_nothing_is_verified(checkpoint: str, run_here: Run, tmp_path: Path) -> None:
    done = run_here("load", checkpoint, "--repeat", "2", "--workers", "1", "--timeline", tmp_path / "load.json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{checkpoint}: 4.94 MB of tensors, not verified: safetensors files hold no checksums"
    assert [line.split()[0] for line in lines[3:5]] == ["1,", "2"]
    assert (tmp_path / "load.json").exists()
    document = json.loads(run_here("load", checkpoint, "--match", "large.[01]", "--json").stdout)
    [load] = document["loads"]
    assert document["is_verified"] is False
    assert load["nbytes"] == load["unverified_nbytes"] == 2 * 1024 * 400 * 4
    assert load["nbytes"] < load["received_nbytes"] < load["nbytes"] + MiB, "a header and the index, too"
    for options in (["--max-gap-size", "1"], ["--allow-global", "x.Y"], ["--ranks", "2", "--verify-whole"]):
        refused = run_here("load", checkpoint, *options)
        assert refused.returncode == 2
        assert "is for DCP checkpoints, and this is safetensors" in refused.stderr


def test_ranks_receive_what_inspect_tells(checkpoint: str, run_here: Run) -> None:
    options = ["--ranks", "2", "--shard", "1", "--match", "large.*", "--match", "bfloat16", "--json"]
    planned = json.loads(run_here("inspect", checkpoint, *options).stdout)["sharded"]["host"]
    document = json.loads(run_here("load", checkpoint, *options, "--workers", "1").stdout)
    [load] = document["loads"]
    assert (document["is_shared"], document["is_verified"]) == (True, False)
    assert load["received_nbytes"] == planned["fetched_nbytes"] == planned["nbytes"] == load["needed_nbytes"]
    assert sum(rank["nbytes"] for rank in load["ranks"]) == load["needed_nbytes"]


def test_files_of_web_servers_and_disks_are_loaded(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aws_environment: None
) -> None:
    save_file(example(), tmp_path / "model.safetensors")
    assert "2,006 tensors" in run_here("inspect", tmp_path).stdout
    assert run_here("load", tmp_path / "model.safetensors").stdout.splitlines()[-2].startswith("1 ")
    assert [run_here(command, tmp_path, "--ranks", "2").returncode for command in ("inspect", "load")] == [2, 2]
    monkeypatch.setenv("HUB_HEADER", "Authorization: Bearer hf_secret")
    with FaultServer({"/hub/model.safetensors": (tmp_path / "model.safetensors").read_bytes()}) as server:
        url = server.url("/hub/model.safetensors") + "?token=hf_secret"
        for command in ("inspect", "load"):
            done = run_here(command, url, "--header-env", "HUB_HEADER", "--header", "X-Other: 1")
            assert done.returncode == 0, done.stderr
            assert "hf_secret" not in done.stdout + done.stderr
        assert {one.headers.get("authorization") for one in server.requests} == {"Bearer hf_secret"}
        assert {one.headers.get("x-other") for one in server.requests} == {"1"}
    wrong = run_here("inspect", url, "--header", "hf_secret")
    assert (wrong.returncode, "hf_secret" in wrong.stderr) == (2, False)
    elsewhere = run_here("load", tmp_path, "--header", "X-Other: 1")
    assert (elsewhere.returncode, "headers are sent to web servers only" in elsewhere.stderr) == (2, True)


def test_kind_of_a_checkpoint_is_recognised(bucket: str, run_here: Run) -> None:
    save_dcp({"weight": torch.ones(10)}, storage_writer=S3StorageWriter(None, f"s3://{bucket}/both"))
    put(bucket, {"both/model.safetensors": save({"a": torch.ones(3), "b": torch.ones(3)}), "neither/data.bin": b"x"})
    assert "1 tensor of 40 B, 0 other items" in run_here("inspect", f"s3://{bucket}/both").stdout
    assert "2 tensors of 24 B; " in run_here("inspect", f"s3://{bucket}/both/model.safetensors").stdout
    for command in ("inspect", "load"):
        missing = run_here(command, f"s3://{bucket}/neither")
        assert missing.returncode == 3
        assert missing.stderr.startswith("mpreader: neither a DCP checkpoint nor safetensors files are there: ")
    folder = run_here("fetch", f"s3://{bucket}/neither")
    assert folder.returncode == 3
    assert f"is no object, but a folder, which begins with s3://{bucket}/neither/data.bin" in folder.stderr


def test_local_dcp_checkpoint_is_told_from_safetensors(tmp_path: Path, run_here: Run) -> None:
    (tmp_path / ".metadata").write_bytes(b"")
    refused = run_here("load", tmp_path)
    assert refused.returncode == 2
    assert "is a DCP checkpoint: mpreader loads those from s3:// only" in refused.stderr


@pytest.mark.parametrize("has_index", [True, False])
def test_kind_is_found_where_listing_is_denied(monkeypatch: pytest.MonkeyPatch, has_index: bool) -> None:
    def deny(call: Call) -> Answer | None:
        # As S3 does it: of an object that is missing it does not say so either.
        is_there = call.path in service.objects
        return None if is_there else error(403, "AccessDenied")

    index = {f"/bucket/model/{INDEX}": b"{}"} if has_index else {}
    with Service({"/bucket/model/a.safetensors": b"", **index}, deny) as service:
        set_environment(monkeypatch, AWS_ENDPOINT_URL_S3=service.url)
        config = S3ClientConfig(unsigned=True, force_path_style=True)
        assert has_safetensors("s3://bucket/model", config) is has_index


ONE, TWO = save({"a": torch.ones(3)}), save({"b": torch.ones(3)})
BOTH = {"1.safetensors": ONE, "2.safetensors": TWO}
NAMES = {"a": "1.safetensors", "b": "2.safetensors"}


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        (BOTH, None, ["ok 2 files with 2 tensors of 24 bytes, headers are valid"]),
        (BOTH, {"weight_map": NAMES, "metadata": {"total_size": 24}}, ["ok 2 files with 2 tensors"]),
        ({"data.bin": ONE}, None, []),
        ({".metadata": b"", **BOTH, "3.safetensors": ONE}, None, []),
        ({**BOTH, "3.safetensors": TWO[:-1]}, None, ["fail .*/3.safetensors: the tensors end at byte .* has .* bytes"]),
        ({**BOTH, "3.safetensors": ONE}, None, ["fail a tensor is there twice: .* 'a' is in .*1.saf.* and in .*3.saf"]),
        ({"1.safetensors": ONE}, {"weight_map": NAMES}, [f"fail .*/2.safetensors: {INDEX} names it, but it is not"]),
        (BOTH, {"weight_map": {**NAMES, "c": "1.safetensors"}}, ["fail .* is wrong: 'c' is said .* in none of the"]),
        (BOTH, {"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}, ["fail .* 'c'", "warn .* name 'b'"]),
        (BOTH, {"weight_map": NAMES, "metadata": {"total_size": 9}}, ["warn .*: its total_size is 9, .* 24 bytes"]),
        (BOTH, [], ["fail .*index.json is damaged"]),
    ],
)  # fmt: skip
def test_doctor_finds_what_is_wrong_with_files(
    bucket: str, files: dict[str, bytes], index: object, expected: list[str]
) -> None:
    described = {} if index is None else {INDEX: json.dumps(index).encode()}
    put(bucket, {f"model/{name}": body for name, body in {**files, **described}.items()})
    found = safetensors_findings(f"s3://{bucket}/model", S3ClientConfig(), POOL)
    assert len(found) == len(expected), found
    for finding, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, f"{finding.status} {finding.value}: {finding.problem}"), finding
        assert bool(finding.remedy) == (finding.status != "ok")
