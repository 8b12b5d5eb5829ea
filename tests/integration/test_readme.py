"""README is true: its snippets run as they are, its settings are the code's, its errors are what is raised."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

import mpreader
from mpreader import PoolConfig, RangeFetcher, S3Client, S3ReaderConstructor, fetch_ranges
from mpreader.config import POOL_SETTINGS
from mpreader.testing import S3Server

README = (Path(__file__).parents[2] / "README.md").read_text()
BUCKET = "my-bucket"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def my_bucket(s3_server: S3Server, aws_environment: None) -> None:
    client = boto3.client("s3")
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        s3_server.create_bucket(BUCKET)
        client.put_object(Bucket=BUCKET, Key="data.bin", Body=bytes(range(250)) * 40)
    client.close()


def test_readme_snippets_run_as_they_are(my_bucket: None, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 3
    names: dict[str, Any] = {}
    for snippet in snippets:
        if "s3torchconnector" in snippet:
            pytest.importorskip("s3torchconnector.dcp")
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
    assert bytes(names["first"]) == bytes(range(100))
    assert len(names["whole"]) == 10_000
    assert "PoolStats" in capsys.readouterr().out


def test_readme_settings_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(MPREADER_\w+)` \| (.*?) \| (\w+) \| (\S+) \|$", README, re.MULTILINE)
    assert rows == [
        (
            name,
            f"MPREADER_{name.upper()}",
            setting.doc,
            setting.unit,
            "host" if setting.default is None else f"{setting.default:g}",
        )
        for name, setting in POOL_SETTINGS.items()
    ]


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
