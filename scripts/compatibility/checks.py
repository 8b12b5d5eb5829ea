"""Checks of what mpreader is used for, against the S3 that the environment variables of boto3 name.

  python scripts/compatibility/checks.py [FOLDER]        the embedded S3, which it starts; prints a line of JSON. FOLDER
                                                         holds checkpoints of other versions of torch, to be loaded, too
  from checks import CHECKS                              for scripts/servers, against a server of its own

Each check takes the name of a bucket, compares every bit, and returns nothing. One that can't be made raises Skipped.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

CONTENT: Final = random.Random(1).randbytes(3_000_000)
RANGES: Final = [(0, 100), (2_999_990, 3_000_000), (1_000_000, 2_500_000), (50, 150)]


class Skipped(Exception):
    """The check can't be made here; the message says why."""


def state(*, empty: bool = False) -> dict[str, Any]:
    """A state of many kinds of tensors; ``empty``: the same shapes to load into."""
    import torch

    tensors = {
        "weight": torch.arange(400_000, dtype=torch.float32).reshape(400, 1000),
        "half": torch.linspace(-3, 3, 999).to(torch.bfloat16),
        "columns": torch.arange(60_000).reshape(200, 300).T,
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
    }
    filled = {name: torch.zeros_like(tensor) if empty else tensor for name, tensor in tensors.items()}
    return {"model": filled, "step": 0 if empty else 100, "names": [] if empty else ["a", "b"]}


def check_save(bucket: str) -> None:
    import torch.distributed.checkpoint as dcp

    from mpreader.dcp import S3StorageWriter

    region = os.environ["AWS_REGION"]
    dcp.save(state(), storage_writer=S3StorageWriter(region, f"s3://{bucket}/checkpoint", thread_count=2))


def check_load(bucket: str) -> None:
    from mpreader.dcp import S3StorageReader

    with S3StorageReader(os.environ["AWS_REGION"], f"s3://{bucket}/checkpoint") as reader:
        _load_and_compare(reader)


def check_boxes(bucket: str, folder: Path | None = None) -> None:
    """Loads boxes of what this torch saves, and of what older ones have left in a folder, where it leaves one, too."""
    import boxes
    import torch.distributed.checkpoint as dcp

    from mpreader.dcp import S3StorageReader, S3StorageWriter

    region = os.environ["AWS_REGION"]
    uris = [f"s3://{bucket}/boxes"]
    dcp.save(boxes.tensors(), storage_writer=S3StorageWriter(region, uris[0]))
    if folder is not None:
        own = boxes.write(folder)
        for written in sorted(folder.iterdir()):
            if _version(written.name) <= _version(own.name):
                uris.append(f"s3://{bucket}/boxes-{written.name}")
                for file in written.iterdir():
                    put(bucket, f"boxes-{written.name}/{file.name}", file.read_bytes())
    for uri in uris:
        boxes.load_and_compare(functools.partial(S3StorageReader, region, uri))


def _version(name: str) -> list[int]:
    return [int(number) for number in name.split(".")[:2]]


def check_drop_in(bucket: str) -> None:
    if importlib.util.find_spec("s3torchconnector") is None:
        raise Skipped("s3torchconnector is not installed")
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader as ConnectorReader

    from mpreader import S3ReaderConstructor

    # For its own requests, those for the metadata, no environment variable says the kind of addressing.
    theirs = S3ClientConfig(force_path_style=True)
    constructor = S3ReaderConstructor.multiprocess()
    uri, region = f"s3://{bucket}/checkpoint", os.environ["AWS_REGION"]
    _load_and_compare(ConnectorReader(region, uri, s3client_config=theirs, reader_constructor=constructor))


def check_fetch(bucket: str) -> None:
    from mpreader import RangeFetcher

    put(bucket, "data.bin")
    with RangeFetcher() as fetcher:
        fetch_and_compare(fetcher, f"s3://{bucket}/data.bin")


def check_asyncio(bucket: str) -> None:
    from mpreader import AsyncRangeFetcher

    async def fetch() -> list[bytes]:
        async with AsyncRangeFetcher() as fetcher:
            return list(map(bytes, await fetcher.fetch(f"s3://{bucket}/data.bin", RANGES)))

    _compare(asyncio.run(fetch()))


def check_fsspec(bucket: str) -> None:
    if importlib.util.find_spec("fsspec") is None:
        raise Skipped("fsspec is not installed")
    from mpreader.fsspec.filesystem import RangeFileSystem

    starts, ends = zip(*RANGES, strict=True)
    files = RangeFileSystem(skip_instance_cache=True)
    _compare(files.cat_ranges([f"{bucket}/data.bin"] * len(RANGES), starts, ends))
    with files.open(f"{bucket}/data.bin") as file:
        assert file.read() == CONTENT


def check_safetensors(bucket: str) -> None:
    if importlib.util.find_spec("mpreader.safetensors") is None:
        raise Skipped("there is no mpreader.safetensors")
    if importlib.util.find_spec("safetensors") is None:
        raise Skipped("safetensors is not installed")
    import safetensors.torch

    from mpreader.safetensors import load_file

    tensors = {name: tensor.contiguous() for name, tensor in state()["model"].items()}
    put(bucket, "model.safetensors", safetensors.torch.save(tensors))
    _compare_tensors(load_file(f"s3://{bucket}/model.safetensors"), tensors)


def check_chart(bucket: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise Skipped("matplotlib is not installed")
    from mpreader import fetch_ranges, record_timeline

    with record_timeline() as timeline, tempfile.TemporaryDirectory() as folder:
        fetch_ranges(f"s3://{bucket}/data.bin", RANGES)
        timeline.save(f"{folder}/timeline.png")
        assert Path(folder, "timeline.png").read_bytes().startswith(b"\x89PNG")


def check_metrics(bucket: str) -> None:
    if importlib.util.find_spec("opentelemetry") is None:
        raise Skipped("opentelemetry-api is not installed")
    from mpreader import fetch_ranges
    from mpreader.telemetry import instrument

    instrument()
    _compare(list(map(bytes, fetch_ranges(f"s3://{bucket}/data.bin", RANGES))))


CHECKS: Final[dict[str, Callable[[str], None]]] = {
    "save": check_save, "load": check_load, "boxes": check_boxes, "drop-in": check_drop_in, "fetch": check_fetch,
    "asyncio": check_asyncio, "fsspec": check_fsspec, "safetensors": check_safetensors, "chart": check_chart,
    "metrics": check_metrics,
}  # fmt: skip


def put(bucket: str, key: str, content: bytes = CONTENT, **options: Any) -> None:
    """Upload an object with boto3, which is not what is checked. Its session knows the environment of now."""
    import boto3

    boto3.session.Session().client("s3").put_object(Bucket=bucket, Key=key, Body=content, **options)


def bucket_made(bucket: str) -> None:
    """Make a bucket with boto3."""
    import boto3

    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)


def fetch_and_compare(fetcher: Any, source: str, content: bytes = CONTENT) -> None:
    """Fetch ranges, all of it, and a stream, with mpreader's fetcher; the bytes must be those of ``content``."""
    ranges = [(start, end) for start, end in RANGES if end <= len(content)]
    _compare(list(map(bytes, fetcher.fetch(source, ranges))), content, ranges)
    assert bytes(fetcher.fetch_object(source)) == content, "the whole object differs"
    pieces = {index: bytes(view) for index, view in fetcher.stream(source, ranges, order="completion")}
    _compare([pieces[index] for index in range(len(ranges))], content, ranges)


def _compare(got: list[bytes], content: bytes = CONTENT, ranges: list[tuple[int, int]] = RANGES) -> None:
    assert got == [content[start:end] for start, end in ranges], "the bytes of the ranges differ"


def _load_and_compare(reader: Any) -> None:
    import torch.distributed.checkpoint as dcp

    loaded, saved = state(empty=True), state()
    dcp.load(loaded, storage_reader=reader)
    _compare_tensors(loaded.pop("model"), saved.pop("model"))
    assert loaded == saved, f"{loaded} instead of {saved}"


def _compare_tensors(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    import torch

    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, f"{name} has another dtype"
        assert torch.equal(got[name], tensor), f"{name} has other values"


def run(checks: dict[str, Callable[[str], None]], bucket: str) -> Iterator[tuple[str, str]]:
    """Make the checks, one after the other; yields the name of each, and "ok", or what went wrong."""
    for name, check in checks.items():
        try:
            check(bucket)
        except Skipped as reason:  # noqa: PERF203
            yield name, f"skipped: {reason}"
        except Exception as error:  # noqa: BLE001  # whatever it is, the other checks are made, too
            traceback.print_exc()
            yield name, f"FAILED: {type(error).__name__}: {error}"
        else:
            yield name, "ok"


def main() -> None:
    from mpreader.testing import S3Server

    warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
    for name in [name for name in os.environ if name.startswith(("AWS_", "MPREADER_"))]:
        del os.environ[name]
    checks = dict(CHECKS)
    if sys.argv[1:]:
        checks["boxes"] = functools.partial(check_boxes, folder=Path(sys.argv[1]))
    with S3Server() as server:
        os.environ.update(server.environment(), MPREADER_PROGRESS="0")
        server.create_bucket("bucket")
        outcomes = dict(run(checks, "bucket"))
    versions = {"Python": sys.version.split()[0]}
    for module in ("torch", "numpy", "boto3"):
        versions[module] = importlib.import_module(module).__version__
    print(json.dumps({"versions": versions, "outcomes": outcomes}))


if __name__ == "__main__":
    main()
