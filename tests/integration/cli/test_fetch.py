"""``mpreader fetch`` as its users run it: what is right, what goes on, and what a mistake says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpreader.testing import Fault, FaultKind, FaultServer, S3Server

DATA = b"".join(number.to_bytes(4, "little") for number in range(500_000))
MD5 = hashlib.md5(DATA).hexdigest()
URI = "s3://bucket/folder/data.bin"
SMALL = ("--workers", "1", "--part-size", "64KiB", "--max-memory", "256KiB")
# Background jobs of a shell are born without SIGINT.
PROGRAM = """
import resource, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{}
from mpreader.cli.main import main
main()
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """Serves the object as S3 would; the environment points there."""
    with FaultServer({"/bucket/folder/data.bin": DATA}) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def start(tmp_path: Path, *arguments: str, prelude: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(prelude), "fetch", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def fetch(tmp_path: Path, *arguments: str, prelude: str = "") -> tuple[int, bytes, str]:
    """Exit code, stdout and stderr."""
    with start(tmp_path, *arguments, prelude=prelude) as process:
        out, err = process.communicate(timeout=60)
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out, err.decode()


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_fetch_gives_the_file_the_objects_name_and_says_that_it_is_verified(
    server: FaultServer, tmp_path: Path
) -> None:
    code, out, err = fetch(tmp_path, URI)
    assert (code, err) == (0, "")
    lines = out.decode().splitlines()
    assert re.fullmatch(r"data\.bin: 2 MB in \d+\.\d\d s", lines[0])
    assert lines[1:] == [f"sha256:{hashlib.sha256(DATA).hexdigest()}", "verified against the MD5 that is its ETag"]
    assert (tmp_path / "data.bin").read_bytes() == DATA
    assert left(tmp_path) == ["data.bin"]


def test_fetch_writes_ranges_and_nothing_else_to_stdout(server: FaultServer, tmp_path: Path) -> None:
    ranges = ("--range", "-8", "--range", "100-300", "--range", "1999990-")
    code, out, err = fetch(tmp_path, URI, *ranges, "-o", "-", "--checksum", "md5")
    expected = DATA[-8:] + DATA[100:300] + DATA[1_999_990:]
    assert (code, out) == (0, expected)
    assert f"md5:{hashlib.md5(expected).hexdigest()}\nnot verified: only ranges" in err
    assert left(tmp_path) == []


def test_fetch_tells_a_program_what_became_of_it(server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "copy").write_text("older")
    url = server.url("/bucket/folder/data.bin").replace("://", "://user:pass-word@") + "?token=secret"
    code, out, err = fetch(tmp_path, url, "-o", "copy", "--checksum", "crc32", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document.pop("seconds") > 0
    assert re.fullmatch("crc32:[0-9a-f]{8}", document.pop("checksum"))
    assert document == {
        "path": "copy",
        "source": server.url("/bucket/folder/data.bin"),
        "bytes": len(DATA),
        "resumed_from": 0,
        "verified_against": None,
        "why_unverified": "an http server stores no checksum",
        "started_over": None,
    }
    assert (tmp_path / "copy").read_bytes() == DATA


def test_timeline_tells_of_each_request(server: FaultServer, tmp_path: Path) -> None:
    code, _, err = fetch(tmp_path, URI, *SMALL, "--timeline", "fetch.json")
    assert (code, err) == (0, "")
    events = json.loads((tmp_path / "fetch.json").read_text())["traceEvents"]
    requests = [event["args"] for event in events if "received" in event["args"]]
    gets = [request for request in server.requests if request.method == "GET"]
    assert len(requests) == len(gets)
    assert sum(request["received"] for request in requests) == len(DATA)
    assert {request["uri"] for request in requests} == {URI}


def test_ctrl_c_keeps_the_part_and_the_same_command_goes_on(server: FaultServer, tmp_path: Path) -> None:
    server.inject(Fault(FaultKind.STALL, covering=1_500_000, seconds=60))
    part = tmp_path / "data.bin.part"
    with start(tmp_path, URI, *SMALL) as process:
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, workers and all
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert re.fullmatch(
        r"mpreader: [\d.]+ [kM]B are in data\.bin\.part; the same command goes on there\s+mpreader: interrupted\n",
        err.decode(),
    )
    kept = part.stat().st_size
    assert 0 < kept <= 1_500_000
    server.inject()
    code, out, _ = fetch(tmp_path, URI, *SMALL, "--json")
    assert code == 0
    assert json.loads(out)["resumed_from"] == kept
    assert json.loads(out)["verified_against"] == "the MD5 that is its ETag"
    assert (tmp_path / "data.bin").read_bytes() == DATA
    assert left(tmp_path) == ["data.bin"]


def test_full_disk_names_the_file_and_the_same_command_goes_on(server: FaultServer, tmp_path: Path) -> None:
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (900_001, 900_001))"
    code, _, err = fetch(tmp_path, URI, *SMALL, prelude=full)
    assert code == 1
    assert err.splitlines() == [
        "mpreader: 900 kB are in data.bin.part; the same command goes on there",
        f"mpreader: {tmp_path}/data.bin.part: File too large",
    ]
    code, out, _ = fetch(tmp_path, URI)
    assert code == 0
    assert "of which 900 kB were there already" in out.decode()
    assert (tmp_path / "data.bin").read_bytes() == DATA


def test_reader_of_the_pipe_that_has_enough_ends_it_without_a_word(server: FaultServer, tmp_path: Path) -> None:
    with start(tmp_path, URI, "-o", "-") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == DATA[:10]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_full_stdout_is_an_error(server: FaultServer, tmp_path: Path) -> None:
    redirect = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    assert fetch(tmp_path, URI, "--range", "0-9", "-o", "-", prelude=redirect) == (
        1,
        b"",
        "mpreader: No space left on device\n",
    )
    code, _, err = fetch(tmp_path, URI, "--json", prelude=redirect)
    assert (code, err) == (1, "mpreader: can't write to stdout: No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("s3://bucket/nothing", 3, "s3://bucket/nothing: the bucket exists, but has no such key"),
        ("s3://bucket", 2, "names a bucket, not an object in it; write s3://bucket/key"),
        ("data.bin", 2, "not a source: 'data.bin'; write s3://bucket/key or https://host/path"),
        (f"{URI} -o .", 2, "'.' is a folder; name a file in it"),
        (f"{URI} -o nowhere/file", 2, "there is no folder "),
        (f"{URI} --range 9-5", 2, "Invalid value for '--range': the range 9-5 ends before it starts"),
        (f"{URI} --range 5-9000000", 2, "the range 5-9000000 lies outside of its 2000000 bytes"),
        (f"{URI} --endpoint-url nowhere", 2, "endpoint_url must start with http:// or https://, got 'nowhere'"),
        (f"{URI} --profile nobody", 2, "The config profile (nobody) could not be found"),
        (f"{URI} --json -o -", 2, "can't both go to stdout"),
        (f"{URI} --timeline fetch.gif", 2, "a timeline is saved as .png (a picture) or .json"),
    ],
)
def test_mistake_ends_in_a_message_and_its_exit_code(
    server: FaultServer, tmp_path: Path, arguments: str, code: int, message: str
) -> None:
    got, out, err = fetch(tmp_path, *arguments.split())
    assert got == code
    assert message in (json.loads(out)["error"]["message"] if "--json" in arguments else err)
    assert left(tmp_path) == []


def test_missing_credentials_and_buckets_are_told(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = fetch(tmp_path, f"s3://{bucket}-not/key")
    assert (code, "there is no such bucket" in err) == (3, True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, _, err = fetch(tmp_path, f"s3://{bucket}/key")
    assert (code, "Unable to locate credentials" in err) == (4, True)


def test_damaged_bytes_are_an_error_and_no_file(server: FaultServer, tmp_path: Path) -> None:
    server.inject(Fault(FaultKind.FLIPPED_BIT, covering=400_000))
    code, out, _ = fetch(tmp_path, URI, "--json")
    error = json.loads(out)["error"]
    assert (code, error["type"], error["bucket"], error["key"]) == (5, "ChecksumMismatch", "bucket", "folder/data.bin")
    assert MD5 in error["message"]
    assert left(tmp_path) == []


# Headers of two versions of one size, and what HEAD leaves out of them.
OLD_AND_NEW = [
    pytest.param({"ETag": 'W/"1"', "Last-Modified": ""}, {"ETag": 'W/"2"', "Last-Modified": ""}, (), "s3", id="weak"),
    pytest.param({"ETag": ""}, {"ETag": ""}, (), "http", id="Last-Modified"),
    pytest.param({}, {}, (Fault(FaultKind.NO_VALIDATORS, method="HEAD"),), "s3", id="only by GET"),
]


@pytest.mark.parametrize(("old", "new", "faults", "scheme"), OLD_AND_NEW)
@pytest.mark.row("object overwritten between GETs")
def test_file_is_never_of_two_versions_also_when_it_is_resumed(
    server: FaultServer,
    tmp_path: Path,
    old: dict[str, str],
    new: dict[str, str],
    faults: tuple[Fault, ...],
    scheme: str,
) -> None:
    path = "/bucket/folder/data.bin"
    source = URI if scheme == "s3" else server.url(path)
    server.put(path, DATA, old)
    # The first command stops in the middle, at an error that stays; the object is overwritten; the second one goes on.
    server.inject(Fault(FaultKind.STATUS, status=404, at=range(10, 1000)), *faults)
    code, _, err = fetch(tmp_path, *SMALL, "--connections", "1", source)
    assert code != 0, err
    assert left(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    server.inject(*faults)
    server.put(path, DATA[::-1], new)
    code, _, err = fetch(tmp_path, *SMALL, source)
    if faults:  # only the bytes show that they are of another version, and then the part is given up
        assert code != 0
        assert "overwritten" in err
        assert left(tmp_path) == []
        code, _, err = fetch(tmp_path, *SMALL, source)
    assert code == 0, err
    assert (tmp_path / "data.bin").read_bytes() == DATA[::-1]
