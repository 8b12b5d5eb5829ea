"""Types as users get them: the installed package has them with it, they are right, and mypy finds mistakes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What is revealed, and the codes of errors, stand behind the lines that mypy is to tell them of.
RIGHT = """
from __future__ import annotations

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import (
    AsyncRangeFetcher, ItemRange, ObjectMissing, PoolConfig, RangeFetcher, S3Client, S3ClientConfig,
    S3ReaderConstructor, fetch_ranges,
)
from mpreader.dcp import S3StorageReader, S3StorageWriter, load_checkpoint


def fetched(uri: str) -> memoryview:
    config = PoolConfig(workers=2, max_memory=1 << 30)
    reveal_type(fetch_ranges(uri, [(0, 10), ItemRange(5, 7)]))  # list[memoryview[int]]
    with RangeFetcher(S3ClientConfig(region="us-east-1"), config, progress=None) as fetcher:
        reveal_type(fetcher)  # RangeFetcher
        fetcher.fetch(uri, [(-8, None)], out=np.empty(8, np.uint8), timeout_s=5)
        fetcher.fetch(uri, None, out=[torch.empty(3), bytearray(5)])
        reveal_type(fetcher.fetch_many({uri: [(0, 1)]}))  # dict[str, list[memoryview[int]]]
        with fetcher.stream(uri, [(0, 5)], order="completion") as stream:
            for index, view in stream:
                reveal_type(index)  # int
                reveal_type(view)  # memoryview[int]
        for name, index, view in fetcher.stream_many({uri: None}):
            reveal_type(name)  # str
        reveal_type(fetcher.stats.bytes)  # int
        reveal_type(fetcher.stats.workers[0].seconds)  # float
        reveal_type(fetcher.stat(uri).etag)  # str
        try:
            return fetcher.fetch_object(uri)
        except ObjectMissing as error:
            reveal_type(error.range)  # tuple[int, int] | None
            raise


async def awaited(uri: str) -> int:
    async with AsyncRangeFetcher() as fetcher:
        reveal_type(await fetcher.fetch(uri, [(0, 1)]))  # list[memoryview[int]]
        return sum([len(view) async for _, view in fetcher.stream(uri, [(0, 1)], order="input")])


def loaded(uri: str) -> None:
    state = {"weight": torch.empty(3)}
    with S3StorageReader("us-east-1", uri, pool_config=PoolConfig(workers=2)) as reader:
        load(state, storage_reader=reader)
        reveal_type(reader)  # S3StorageReader
    save(state, storage_writer=S3StorageWriter(None, uri, thread_count=4))
    reveal_type(load_checkpoint(uri))  # dict[str, Any]
    S3StorageReader(None, uri, reader_constructor=S3ReaderConstructor.sequential())
    constructor = S3ReaderConstructor.multiprocess(pool_config=PoolConfig())
    reveal_type(constructor)  # MultiprocessConstructor
    reader_of_one = S3Client("us-east-1").get_object("bucket", "key", reader_constructor=constructor)
    reveal_type(reader_of_one.read(10))  # bytes
"""

WRONG = """
from mpreader import PoolConfig, RangeFetcher, S3ReaderConstructor, fetch_ranges
from mpreader.dcp import S3StorageReader

fetch_ranges("s3://bucket/key", [("0", 10)])  # error: list-item
PoolConfig(worker=2)  # error: call-arg
RangeFetcher().stream("s3://bucket/key", [(0, 1)], order="size")  # error: arg-type
S3StorageReader("us-east-1", "s3://bucket/key", reader_constructor=S3ReaderConstructor.sequential)  # error: arg-type
RangeFetcher().stats.bytes = 0  # error: misc
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the package as pip installs it; where it is developed, mypy doesn't see it at all."""
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("it can't be built here, without a network")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "mpreader", source / "mpreader", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return target


def expected(program: str, name: str) -> list[tuple[str, int, str]]:
    """Return what mypy is to say of a program, by its comments: file, line, and type or error."""
    comments = ((number, line.partition("  # ")[2]) for number, line in enumerate(program.splitlines(), 1))
    return [(name, number, comment) for number, comment in comments if comment]


def told(output: str) -> list[tuple[str, int, str]]:
    """The same of what mypy has printed; types without the modules that they are of."""
    found = []
    for name, number, kind, text in re.findall(r"^(\w+\.py):(\d+): (\w+): (.*)$", output, re.MULTILINE):
        if revealed := re.fullmatch(r'Revealed type is "(.*)"', text):
            found.append((name, int(number), re.sub(r"\b(\w+\.)+", "", revealed[1])))
        elif kind == "error":
            found.append((name, int(number), f"error: {text.rpartition('[')[2].removesuffix(']')}"))
    return found


def test_users_programs_are_checked_by_the_types_of_the_installed_package(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    programs = {"right.py": RIGHT, "wrong.py": WRONG}
    for name, text in programs.items():
        (folder / name).write_text(text)
    # What mpreader.dcp makes of torch is checked with the tests; to read all of torch takes mypy longer than the rest.
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path / "cache"), *programs],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert sorted(told(done.stdout)) == [wanted for name, text in programs.items() for wanted in expected(text, name)]
    assert done.stdout.count("error:") == 5
