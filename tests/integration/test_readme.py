"""README is true: its snippets and commands run as they are, its errors are those that are raised."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import mpreader
from mpreader import PoolConfig, RangeFetcher, S3Client, S3ReaderConstructor, fetch_ranges
from mpreader.dcp import S3StorageWriter
from mpreader.testing import S3Server

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

README = (Path(__file__).parents[2] / "README.md").read_text()
BUCKET = "my-bucket"

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]


@pytest.fixture
def my_bucket(s3_server: S3Server, aws_environment: None) -> None:
    client = boto3.client("s3")
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        s3_server.create_bucket(BUCKET)
        client.put_object(Bucket=BUCKET, Key="data.bin", Body=bytes(range(250)) * 40)
    client.close()


def test_readme_snippets_run_as_they_are(
    my_bucket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("torch", "fsspec", "s3torchconnector.dcp"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 7
    names: dict[str, Any] = {}
    for snippet in snippets:
        if "s3torchconnector" in snippet:
            # An endpoint of this machine has no bucket.localhost: s3torchconnector must be told.
            snippet = snippet.replace(
                '"us-east-1", "s3://my-bucket/checkpoint", reader',
                '"us-east-1", "s3://my-bucket/checkpoint", PATH_STYLE, reader',
            )
            from s3torchconnector import S3ClientConfig

            names["PATH_STYLE"] = S3ClientConfig(force_path_style=True)
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["state"]["step"] == 100
    assert bool((names["state"]["weight"] == 1).all())
    names["filesystem"].clear_instance_cache()  # which fsspec keeps, and with it an S3 client
    assert bool((names["tensors"]["weight"] == 1).all())
    assert bool((names["module"].weight == 1).all())
    data = bytes(range(250)) * 40
    assert (bytes(names["first"]), bytes(names["tail"]), bytes(names["whole"])) == (data[:100], data[-8:], data)
    assert [bytes(view) for view in names["views"]] == [data[900:1_000], data[:10], data[:10]]
    assert names["rows"].tobytes() == data[:4_000]
    assert names["pieces"] == [data[:10], data[500:600]]
    assert json.loads((tmp_path / "load.json").read_text())["traceEvents"]
    printed = capsys.readouterr().out
    assert "1 5000\n" in printed
    assert "WorkerStats(bytes=4002838, requests=1" in printed


def test_readme_commands_run_as_they_are(
    my_bucket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_interpreter: WarmInterpreter
) -> None:
    state = {"weight": torch.ones(1000, 1000), "step": 100}
    save(state, storage_writer=S3StorageWriter("us-east-1", "s3://my-bucket/checkpoint"), no_dist=True)
    monkeypatch.chdir(tmp_path)
    rows = re.findall(r"^\| `(mpreader .*?)` \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        if row == "mpreader demo":
            continue  # it takes long, and is run by scripts/demo, and by test_cli_demo in small
        quickly = ["--repeat=1", "--workers=1", "--connections=4", "--part-size=8MiB"] if " bench " in row else []
        result = warm_interpreter.run(*row.split(), *quickly, module="mpreader")
        assert result.returncode == 0, (row, result.stdout, result.stderr)
        assert result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"load.png", "bench.png", "model.pt", "head.bin"}
    assert (tmp_path / "head.bin").read_bytes() == bytes(range(100))


def _closed_reader() -> object:
    reader = S3Client().get_object(BUCKET, "data.bin")
    reader.close()
    return reader.read()


def _closed_fetcher() -> object:
    with RangeFetcher() as fetcher:
        pass
    return fetcher.fetch("s3://my-bucket/data.bin", [(0, 1)])


def _no_credentials() -> object:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            patch.delenv(name)
        return fetch_ranges("s3://my-bucket/data.bin", [(0, 1)])


def _wrong_setting() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPREADER_WORKERS", "two")
        return fetch_ranges("s3://my-bucket/data.bin", [(0, 1)])


def _too_much() -> object:
    with RangeFetcher(pool_config=PoolConfig(max_memory=4 << 20)) as fetcher:
        return fetcher.fetch("s3://my-bucket/data.bin", [(0, 10_000_000)])


WRONG: dict[str, Callable[[], object]] = {
    "no such bucket": lambda: fetch_ranges("s3://my-buckte/checkpoint", [(0, 1)]),
    "no such key": lambda: fetch_ranges("s3://my-bucket/checkpiont", [(0, 1)]),
    "no credentials": _no_credentials,
    "a gap that is no number": lambda: S3ReaderConstructor.multiprocess(max_gap_size="1"),  # type: ignore[arg-type]
    "a negative gap": lambda: S3ReaderConstructor.multiprocess(max_gap_size=-1),
    "a range past the end": lambda: fetch_ranges("s3://my-bucket/data.bin", [(0, 10_001)]),
    "a reader that was closed": _closed_reader,
    "a fetcher that was closed": _closed_fetcher,
    "more than may be held": _too_much,
    "a wrong setting": _wrong_setting,
}


def _row(what: str) -> str:
    match = re.search(rf"^\| {re.escape(what)} \| `+(.*?)`+ \|$", README, re.MULTILINE)
    assert match is not None, f"README has no row for {what!r}"
    return match[1]


@pytest.mark.parametrize("what", WRONG)
def test_readme_quotes_the_error(what: str, my_bucket: None) -> None:
    with pytest.raises((mpreader.MpreaderError, TypeError, ValueError)) as caught:
        WRONG[what]()
    says = f"{type(caught.value).__name__}: {caught.value}"
    assert re.sub(r"endpoint http://[\d.:]+", "endpoint …", says) == _row(what)
