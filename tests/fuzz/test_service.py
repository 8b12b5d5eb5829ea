"""Every public entry against a service that answers nonsense: right bytes, or an error of ours, and nothing else."""

from __future__ import annotations

import asyncio
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mpreader import (
    AsyncRangeFetcher,
    MpreaderError,
    PoolConfig,
    RangeFetcher,
    S3Client,
    S3ClientConfig,
    S3ReaderConstructor,
    fetch_ranges,
)
from mpreader.cli.main import main
from mpreader.dcp import S3FileSystem, S3StorageReader, S3StorageWriter, dcp_to_torch_save, load_checkpoint
from mpreader.tools.doctor.access import examine_access
from tests.fuzz.nonsense import Nonsense
from tests.integration.service import Answer, Call, Service, set_environment

DATA: Final = random.Random(1).randbytes(9000)
WEIGHT: Final = torch.arange(1000)
POOL: Final = PoolConfig(
    workers=1, connections_per_worker=2, max_memory=2 << 20, part_size=64 << 10, stall_timeout_s=5.0
)
# Kinds of nonsense that each entry gets.
CASES: Final = max(8, int(os.environ.get("MPREADER_FUZZ_EXAMPLES", "200")) // 20)


@dataclass(frozen=True)
class _Impatient(S3ClientConfig):
    max_attempts: int = 1


class Target(NamedTuple):
    """What an entry is called with: each case has a bucket of its own, as clients remember what buckets are like."""

    url: str
    bucket: str
    config: S3ClientConfig
    fetcher: RangeFetcher
    folder: Path

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/data"

    @property
    def run(self) -> str:
        return f"s3://{self.bucket}/run"

    @property
    def http(self) -> str:
        return f"{self.url}/{self.bucket}/data"

    def client(self) -> S3Client:
        return S3Client(s3client_config=self.config)

    def fsspec(self) -> Any:
        return fsspec.filesystem(
            "mpreader",
            skip_instance_cache=True,
            s3client_config=self.config,
            pool_config=POOL,
            use_listings_cache=False,
        )


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"weight": WEIGHT, "step": 5}, storage_writer=FileSystemWriter(folder))  # type: ignore[attr-defined]
    return {"data": DATA, "empty": b"", **{f"run/{path.name}": path.read_bytes() for path in folder.iterdir()}}


class _Store(Service):
    """A service whose every bucket has the same objects."""

    def usual(self, call: Call) -> Answer:
        bucket = call.path.split("/")[1]
        if "session" in call.query:  # of a directory bucket
            keys = "<SessionToken>t</SessionToken><SecretAccessKey>s</SecretAccessKey><AccessKeyId>a</AccessKeyId>"
            expiry = "<Expiration>2999-01-01T00:00:00Z</Expiration>"
            body = f"<CreateSessionResult><Credentials>{keys}{expiry}</Credentials></CreateSessionResult>".encode()
            return Answer(200, [("Content-Length", str(len(body)))], body)
        if call.method == "PUT" and "uploadId" in call.query:
            return Answer(200, [("ETag", '"a"'), ("Content-Length", "0")])
        if call.method == "POST":
            body = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
            if "uploadId" in call.query:
                body = b"<CompleteMultipartUploadResult><ETag>a</ETag></CompleteMultipartUploadResult>"
            return Answer(200, [("Content-Length", str(len(body)))], body)
        if call.method == "PUT":
            body = b"<CopyObjectResult><ETag>&quot;a&quot;</ETag></CopyObjectResult>"
            body = body if "x-amz-copy-source" in call.headers else b""
            return Answer(200, [("ETag", '"a"'), ("Content-Length", str(len(body)))], body)
        if call.method == "DELETE":
            return Answer(204)
        return super().usual(call._replace(target=call.target.replace(f"/{bucket}", "/bucket", 1)))


@pytest.fixture(scope="module")
def store(objects: dict[str, bytes]) -> Iterator[_Store]:
    with _Store({f"/bucket/{key}": data for key, data in objects.items()}) as store:
        yield store


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, store: Service) -> None:
    set_environment(
        monkeypatch,
        AWS_ACCESS_KEY_ID="AKIAKEY",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_ENDPOINT_URL_S3=store.url,
        MPREADER_WORKERS="1",
        MPREADER_MAX_MEMORY="4MiB",
    )


# -- the entries: each returns True if what it got is right


def _async(target: Target) -> bool:
    async def read() -> bool:
        async with AsyncRangeFetcher(s3client_config=target.config, pool_config=POOL) as fetcher:
            [view] = await fetcher.fetch(target.uri, [(5, 900)])
            pieces = [bytes(piece) async for _, piece in fetcher.stream(target.uri, [(0, 10), (-5, None)])]
            return bytes(view) == DATA[5:900] and pieces == [DATA[:10], DATA[-5:]]

    return asyncio.run(read())


def _reader(kind: str) -> Callable[[Target], bool]:
    def read(target: Target) -> bool:
        make = getattr(S3ReaderConstructor, kind)()
        with target.client().get_object(target.bucket, "data", reader_constructor=make) as reader:
            head = bytes(reader.read(100))
            reader.seek(-100, os.SEEK_END)
            return head == DATA[:100] and bytes(reader.read()) == DATA[-100:]

    return read


def _load(kind: str) -> Callable[[Target], bool]:
    def load(target: Target) -> bool:
        options = {"pool_config": POOL, "s3client_config": target.config} if kind == "multiprocess" else {}
        state: dict[str, Any] = {"weight": torch.empty(1000, dtype=torch.int64), "step": 0}
        make = getattr(S3ReaderConstructor, kind)(**options)
        with S3StorageReader(None, target.run, target.config, make) as reader:
            dcp.load(state, storage_reader=reader, no_dist=True)  # type: ignore[attr-defined]
        return torch.equal(state["weight"], WEIGHT) and state["step"] == 5

    return load


def _save(target: Target) -> bool:
    dcp.save(  # type: ignore[attr-defined]
        {"w": torch.ones(3)}, storage_writer=S3StorageWriter(None, target.run, target.config), no_dist=True
    )
    return True


def _load_checkpoint(target: Target) -> bool:
    state = load_checkpoint(target.run, s3client_config=target.config, pool_config=POOL, progress=False)
    return torch.equal(state["weight"], WEIGHT)


def _convert(target: Target) -> bool:
    path = target.folder / "model.pt"
    path.unlink(missing_ok=True)
    dcp_to_torch_save(target.run, path, s3client_config=target.config, pool_config=POOL)
    return torch.equal(torch.load(path)["weight"], WEIGHT)


def _write(size: int) -> Callable[[Target], bool]:
    def write(target: Target) -> bool:
        with target.client().put_object(target.bucket, "new") as writer:
            writer.write(bytes(size))
        return True

    return write


def _stream(target: Target) -> bool:
    return [bytes(view) for _, view in target.fetcher.stream(target.uri, [(0, 5), (5, 900)])] == [DATA[:5], DATA[5:900]]


def _open_file(target: Target) -> bool:
    with target.fsspec().open(f"{target.bucket}/data") as file:
        return bool(file.read(5) == DATA[:5] and file.seek(-5, 2) and file.read() == DATA[-5:])


def _torch_stream(target: Target) -> bool:
    with S3FileSystem(None, s3client_config=target.config).create_stream(target.uri, "rb") as stream:
        return bytes(stream.read(5)) == DATA[:5]


def _done(_: object) -> bool:
    return True


def _doctor(target: Target) -> bool:
    return bool(list(examine_access(target.run, target.config)))


ENTRIES: Final[dict[str, Callable[[Target], bool]]] = {
    "fetch_ranges": lambda t: (
        bytes(fetch_ranges(t.uri, [(5, 900)], pool_config=POOL, s3client_config=t.config)[0]) == DATA[5:900]
    ),
    "fetch": lambda t: bytes(t.fetcher.fetch(t.uri, [(5, 900)])[0]) == DATA[5:900],
    "fetch-tail": lambda t: bytes(t.fetcher.fetch(t.uri, [(-5, None)])[0]) == DATA[-5:],
    "fetch_many": lambda t: (
        [*map(bytes, t.fetcher.fetch_many({t.uri: [(0, 5)], t.http: [(1, 9)]})[t.uri])] == [DATA[:5]]
    ),
    "fetch-directory-bucket": lambda t: (
        bytes(t.fetcher.fetch(f"s3://{t.bucket}--use1-az4--x-s3/data", [(5, 900)])[0]) == DATA[5:900]
    ),
    "stream": _stream,
    "fetch_object": lambda t: bytes(t.fetcher.fetch_object(t.uri)) == DATA,
    "fetch_object-empty": lambda t: bytes(t.fetcher.fetch_object(t.uri.replace("data", "empty"))) in (b"", DATA),
    "stat": lambda t: t.fetcher.stat(t.uri).size >= 0,
    "http-fetch": lambda t: bytes(t.fetcher.fetch(t.http, [(5, 900)])[0]) == DATA[5:900],
    "http-fetch_object": lambda t: bytes(t.fetcher.fetch_object(t.http)) == DATA,
    "async": _async,
    "reader-sequential": _reader("sequential"),
    "reader-range_based": _reader("range_based"),
    "dcp.load": _load("multiprocess"),
    "dcp.load-sequential": _load("sequential"),
    "dcp.load-dcp_optimized": _load("dcp_optimized"),
    "dcp.save": _save,
    "load_checkpoint": _load_checkpoint,
    "dcp_to_torch_save": _convert,
    "head_object": lambda t: t.client().head_object(t.bucket, "data").size >= 0,
    "list_objects": lambda t: all(page.object_info is not None for page in t.client().list_objects(t.bucket, "run/")),
    "checksums": lambda t: t.client().checksums(t.bucket, "data") is not None,
    "put_object": _write(9),
    "put_object-parts": _write(11 << 20),
    "copy_object": lambda t: _done(t.client().copy_object(t.bucket, "data", t.bucket, "copy")),  # type: ignore[func-returns-value]
    "delete_object": lambda t: _done(t.client().delete_object(t.bucket, "data")),  # type: ignore[func-returns-value]
    "presign": lambda t: t.client().presign(t.bucket, "data").url.startswith(t.url),
    "filesystem-exists": lambda t: S3FileSystem(s3client_config=t.config).exists(t.uri) in (True, False),
    "filesystem-ls": lambda t: isinstance(S3FileSystem(s3client_config=t.config).ls(t.run), list),
    "filesystem-rename": lambda t: _done(S3FileSystem(s3client_config=t.config).rename(t.uri, t.uri + "2")),  # type: ignore[func-returns-value]
    "filesystem-rm_file": lambda t: _done(S3FileSystem(s3client_config=t.config).rm_file(t.uri)),  # type: ignore[func-returns-value]
    "filesystem-create_stream": _torch_stream,
    "fsspec-info": lambda t: t.fsspec().info(f"{t.bucket}/data") is not None,
    "fsspec-exists": lambda t: t.fsspec().exists(f"{t.bucket}/data") in (True, False),
    "fsspec-ls": lambda t: isinstance(t.fsspec().ls(f"{t.bucket}/run"), list),
    "fsspec-find": lambda t: isinstance(t.fsspec().find(f"{t.bucket}/run"), list),
    "fsspec-glob": lambda t: isinstance(t.fsspec().glob(f"{t.bucket}/run/*"), list),
    "fsspec-du": lambda t: t.fsspec().du(f"{t.bucket}/run") is not None,
    "fsspec-cat_file": lambda t: t.fsspec().cat_file(f"{t.bucket}/data") == DATA,
    "fsspec-cat_ranges": lambda t: (
        t.fsspec().cat_ranges([f"{t.bucket}/data"] * 2, [0, 5], [5, 9], on_error="raise") == [DATA[:5], DATA[5:9]]
    ),
    "fsspec-open": _open_file,
    "doctor": _doctor,
}
COMMANDS: Final[dict[str, Callable[[Target], list[str]]]] = {
    "fetch": lambda t: ["fetch", t.uri, "-o", str(t.folder / "data"), "--no-resume"],
    "fetch-http": lambda t: ["fetch", t.http, "-o", str(t.folder / "data"), "--no-resume"],
    "inspect": lambda t: ["inspect", t.run],
    "load": lambda t: ["load", t.run],
    "convert": lambda t: ["convert", t.run, str(t.folder / "command.pt"), "--overwrite"],
    "doctor": lambda t: ["doctor", t.run],
}


@pytest.fixture
def make_target(
    environment: None, store: _Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Target]]:
    # The pauses between attempts are what takes the time; that they are made is shown elsewhere.
    monkeypatch.setattr("mpreader.pool.coordinator.retry._MAX_DELAY_S", 0.001)
    monkeypatch.setattr("mpreader.cli.options.S3ClientConfig", _Impatient)
    monkeypatch.setattr("mpreader.s3.stream._LONGEST_PAUSE_S", 0.001)
    config = S3ClientConfig(endpoint_url=store.url, force_path_style=True, max_attempts=1)
    with RangeFetcher(config, POOL) as fetcher:

        def make(seed: int) -> Target:
            nonsense = Nonsense(seed)
            store.hook = lambda call: nonsense.answer(call, store.usual(call))
            return Target(store.url, f"bucket-{seed}", config, fetcher, tmp_path)

        yield make


def _seeds(entry: str) -> Iterator[int]:
    chance = random.Random(entry)  # so that each entry gets others
    first = int(os.environ.get("MPREADER_FUZZ_SEED", "-1"))
    yield from ([first] if first >= 0 else (chance.randrange(10**9) for _ in range(CASES)))


def _outcome(entry: Callable[[Target], bool], target: Target) -> bool | BaseException:
    try:
        return entry(target)
    except (Exception, CheckpointException) as error:  # noqa: BLE001  # which ones are right is what is tested
        return error


def _is_ours(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):  # torch's, with those of the ranks in it
        return all(_is_ours(failure[0]) for failure in error.failures.values())
    # torch makes one of the errors of two files, of which a checkpoint must have one.
    if isinstance(error, AssertionError) and "metadata read failed: s3://" in str(error):
        return True
    # fsspec's own words for a path that is another thing than it must be.
    return isinstance(error, (MpreaderError, IsADirectoryError, NotADirectoryError)) or type(error) is FileNotFoundError


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint", "ignore:unclosed <socket"
)
@pytest.mark.timeout(0)
@pytest.mark.parametrize("entry", ENTRIES)
def test_nonsense_ends_in_right_bytes_or_an_error_of_ours(make_target: Callable[[int], Target], entry: str) -> None:
    for seed in _seeds(entry):
        target = make_target(seed)
        outcome = _outcome(ENTRIES[entry], target)
        assert outcome is True or (isinstance(outcome, BaseException) and _is_ours(outcome)), (
            f"MPREADER_FUZZ_SEED={seed}: {outcome!r}"
        )
        assert "internal error" not in str(outcome), f"MPREADER_FUZZ_SEED={seed}: {outcome!r}"


@pytest.mark.filterwarnings("ignore:unclosed <socket")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", COMMANDS)
def test_command_that_gets_nonsense_ends_with_a_code_and_a_message(
    make_target: Callable[[int], Target], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for seed in list(_seeds(name))[: max(1, CASES // 2)]:
        target = make_target(seed)
        with pytest.raises(SystemExit) as ended:
            main([*COMMANDS[name](target), "--endpoint-url", target.url])
        shown = capsys.readouterr()
        assert ended.value.code in (0, 1, 2, 3, 4, 5), f"MPREADER_FUZZ_SEED={seed}"
        assert "internal error" not in shown.err, f"MPREADER_FUZZ_SEED={seed}: {shown.err}"
        assert "Traceback" not in shown.err + shown.out, f"MPREADER_FUZZ_SEED={seed}"
        assert ended.value.code == 0 or shown.err or shown.out
