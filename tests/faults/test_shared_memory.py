"""A /dev/shm that is smaller than ``max_memory``: a load ends, right or in one clear error."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from mpreader import S3Client
from tests.refusal import refusing

ITEM = 4_200_000  # three parts: more than such an arena may hold at one time
ITEMS = 4

READ = f"""
import sys
from types import SimpleNamespace as Item
from mpreader import MpreaderError, PoolConfig, S3Client, S3ReaderConstructor

bucket, way = sys.argv[1:]
constructor = S3ReaderConstructor.multiprocess(pool_config=PoolConfig(2, max_memory=32 << 20, lease_timeout_s=1.0))
plan = [Item(storage_index=i) for i in range({ITEMS})]
stored = {{i: Item(relative_path="f", offset=i * {ITEM}, length={ITEM}) for i in range({ITEMS})}}
constructor.set_item_ranges_by_file(plan, stored, f"s3://{{bucket}}/c")
seen = b""
try:
    with S3Client().get_object(bucket, "c/f", reader_constructor=constructor) as reader:
        for i in range({ITEMS}):
            if way == "in place":
                seen = b"".join(map(bytes, reader.item(i * {ITEM}, {ITEM}).pieces(0, {ITEM})))
            elif way == "as a file":
                seen = bytes(reader.read({ITEM}))
            else:
                seen = b"".join(bytes(reader.read({ITEM} // 64)) for _ in range(64))
            assert seen == bytes([i]) * {ITEM}
    print("all right")
except MpreaderError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("way", ["in place", "as a file", "in short reads"])
@pytest.mark.row("small or full /dev/shm")
def test_read_with_less_shared_memory_than_allowed_ends(bucket: str, way: str) -> None:
    unshare = shutil.which("unshare")
    mounted = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("needs a private mount: run as root, with unshare")
    client = S3Client()
    with client.put_object(bucket, "c/f") as writer:
        for i in range(ITEMS):
            writer.write(bytes([i]) * ITEM)
    client.close()
    command = [
        unshare,
        "-m",
        *refusing(["memfd_create"]),
        "sh",
        "-c",
        f'{mounted} && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        READ,
        bucket,
        way,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    if way != "in short reads":
        assert result.stdout == "all right\n"
    else:  # it may go back anywhere, so that the whole item is held, which does not fit
        assert result.stdout.startswith("Arena")
        assert "MPREADER_MAX_MEMORY" in result.stdout
