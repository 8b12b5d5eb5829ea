"""Comparison of boto3, s3fs, s3torchconnector, obstore and mpreader: how they respond to the same faults and oddities.

  scripts/peers                        every library with every one: about 4 minutes
  scripts/peers --markdown FILE        the same, and writes the table as Markdown
  scripts/peers --one obstore reset    one of them, with the requests that the server got

mpreader.testing.FaultServer takes the place of S3, for some rows behind a front (front.py). Each attempt has a process
and a server of its own, and the default settings of the library. It fetches known bytes, which are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import queue
import random
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from front import Front

from mpreader.testing import Fault, FaultedRequest, FaultKind, FaultServer

MIB: Final = 1024 * 1024
BUCKET, KEY = "bucket", "object"
PATH: Final = f"/{BUCKET}/{KEY}"
REGION: Final = "us-east-1"
LIMIT_S: Final = 75  # the longest timeout of the defaults is botocore's, 60 s without a byte
S3FS_FOLDER: Final = Path(sys.prefix) / "s3fs"
AT_ONCE: Final = 4  # attempts at one time; they wait more than they work

# s3torchconnector's reader fetches 8 MiB where it is asked for less: there must be two GETs for two ranges, and the
# last range must end with the object, so that all fetch the same.
OLD, NEW = (random.Random(seed).randbytes(12 * MIB) for seed in (1, 2))
Ranges = Sequence[tuple[int, int]]
LAST: Final[Ranges] = ((11 * MIB, 12 * MIB),)
SMALL: Final = 4 * MIB  # one part of every library
WHOLE: Final[Ranges] = ((0, SMALL),)
TWO: Final[Ranges] = ((0, MIB), *LAST)

Read = Callable[[int, int], bytes]
Table = list[list[str]]


class Peer(ABC):
    """A library, with a client that is made from the environment variables.

    Libraries are imported by the methods, so that the process of an attempt imports one of them only.
    """

    @abstractmethod
    def open(self) -> Read:
        """Open the object once, if the library can; returns the function that reads its bytes [start, end)."""

    def fetch(self, ranges: Ranges) -> list[bytes]:
        """Fetch the ranges, in one call if the library can; returns the bytes of each."""
        read = self.open()
        return [read(start, end) for start, end in ranges]


class Mpreader(Peer):
    def open(self) -> Read:
        from mpreader import S3Client, S3ReaderConstructor

        return _read_of(S3Client().get_object(BUCKET, KEY, reader_constructor=S3ReaderConstructor.range_based()))

    def fetch(self, ranges: Ranges) -> list[bytes]:
        from mpreader import RangeFetcher

        with RangeFetcher() as fetcher:
            return list(map(bytes, fetcher.fetch(f"s3://{BUCKET}/{KEY}", ranges)))


class Connector(Peer):
    def __init__(self) -> None:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client

        self._client = S3Client(REGION, s3client_config=S3ClientConfig(force_path_style=True))

    def open(self) -> Read:
        from s3torchconnector import S3ReaderConstructor

        return _read_of(self._client.get_object(BUCKET, KEY, reader_constructor=S3ReaderConstructor.range_based()))


class Obstore(Peer):
    def __init__(self) -> None:
        from obstore.store import S3Store

        options: Any = {"allow_http": True}
        self._store = S3Store(BUCKET, region=REGION, virtual_hosted_style_request=False, client_options=options)

    def open(self) -> Read:
        import obstore

        return _read_of(obstore.open_reader(self._store, KEY))

    def fetch(self, ranges: Ranges) -> list[bytes]:
        starts, ends = zip(*ranges, strict=True)
        return list(map(bytes, self._store.get_ranges(KEY, starts=starts, ends=ends)))


class Boto3(Peer):
    def __init__(self) -> None:
        import boto3

        self._client = boto3.client("s3")

    def open(self) -> Read:
        return self._get

    def _get(self, start: int, end: int) -> bytes:
        body: bytes = self._client.get_object(Bucket=BUCKET, Key=KEY, Range=f"bytes={start}-{end - 1}")["Body"].read()
        return body


class S3fs(Peer):
    """s3fs, from the folder of its own that scripts/bench_environment.sh makes: it needs another botocore."""

    def __init__(self) -> None:
        sys.path.insert(0, str(S3FS_FOLDER))
        # mpreader.testing has imported nothing of what is in that folder.
        s3fs = importlib.import_module("s3fs")
        self._files = s3fs.S3FileSystem(client_kwargs={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]})

    def open(self) -> Read:
        return _read_of(self._files.open(f"{BUCKET}/{KEY}"))

    def fetch(self, ranges: Ranges) -> list[bytes]:
        starts, ends = zip(*ranges, strict=True)
        return list(self._files.cat_ranges([f"{BUCKET}/{KEY}"] * len(ranges), list(starts), list(ends)))


def _read_of(file: Any) -> Read:
    def read(start: int, end: int) -> bytes:
        file.seek(start)
        return bytes(file.read(end - start))

    return read


PEERS: Final[dict[str, type[Peer]]] = {
    "mpreader": Mpreader, "s3torchconnector": Connector, "obstore": Obstore, "boto3": Boto3,
    "s3fs": S3fs,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table: faults, and the read that they strike.

    Args:
        title: Title of the row.
        faults: Faults of the server.
        ranges: Ranges that are read, ends exclusive.
        is_lie: True: the bytes are right, but the headers that the last fault changes say that they are others, so that
            a client that checks headers must refuse the bytes.
        overwrites: True: the object is overwritten after the first range was read.
        headers: Headers of the stored object, in place of the usual ETag and Last-Modified too; "": not sent.
        staged: Headers of the version that a fault replaces it with.
        size: Bytes of the object.
        front: The front that stands before the server; "": none.
    """

    title: str
    faults: tuple[Fault, ...] = ()
    ranges: Ranges = LAST
    is_lie: bool = False
    overwrites: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    staged: Mapping[str, str] = field(default_factory=dict)
    size: int = 12 * MIB
    front: str = ""


def _first(kind: FaultKind, **details: Any) -> tuple[Fault, ...]:
    return (Fault(kind, at=(1,), **details),)


RESET: Final = _first(FaultKind.RESET, after_bytes=300_000)
SECOND_IS_ANOTHER: Final = (Fault(FaultKind.OVERWRITTEN, at=(2,)),)
OLD_DATE, NEW_DATE = ({"Last-Modified": f"Thu, 0{day} Jan 2026 00:00:00 GMT"} for day in (1, 8))
NOTHING: Final = {"ETag": "", "Last-Modified": ""}
NO_HEAD: Final = (Fault(FaultKind.STATUS, method="HEAD", status=403),)
ALWAYS_WHOLE: Final = (Fault(FaultKind.WHOLE_OBJECT),)
NO_CONDITIONS: Final = (Fault(FaultKind.NO_IF_MATCH, status=501, code="NotImplemented"),)
ANOTHER_ETAG: Final = (Fault(FaultKind.OTHER_ETAG, at=range(2, 100)),)

ROWS: Final = {
    "none": Row("no fault"),
    "reset": Row("connection reset within the body", RESET),
    "close": Row("connection closed within the body", _first(FaultKind.EARLY_CLOSE, after_bytes=300_000)),
    "short": Row("Content-Length and body too short", _first(FaultKind.WRONG_LENGTH, delta=-1000)),
    "extra": Row("extra bytes after the body", _first(FaultKind.EXTRA_BYTES, delta=1000)),
    "whole": Row("200 and the whole object for a range", _first(FaultKind.WHOLE_OBJECT)),
    "range": Row("Content-Range of another range", _first(FaultKind.WRONG_RANGE, delta=-MIB), is_lie=True),
    "total": Row("Content-Range of a larger object", _first(FaultKind.WRONG_TOTAL), is_lie=True),
    "no-etag": Row("no ETag", _first(FaultKind.NO_ETAG), is_lie=True),
    "rest": Row("reset, and then another ETag", RESET + ANOTHER_ETAG, is_lie=True),
    "etag": Row("two ranges, the second of another ETag", ANOTHER_ETAG, TWO, is_lie=True),
    "overwritten": Row("object overwritten between two reads", ranges=TWO, overwrites=True),
    "503": Row("503 three times", (Fault(FaultKind.STATUS, at=(1, 2, 3)),)),
    "stall": Row("body stalls", _first(FaultKind.STALL, after_bytes=300_000, seconds=120)),
    "weak-changes": Row(
        "overwritten between two ranges; weak ETags", SECOND_IS_ANOTHER, TWO,
        headers={"ETag": 'W/"1"', **OLD_DATE}, staged={"ETag": 'W/"2"', **OLD_DATE},
    ),
    "date-changes": Row(
        "overwritten between two ranges; Last-Modified only", SECOND_IS_ANOTHER, TWO,
        headers={"ETag": "", **OLD_DATE}, staged={"ETag": "", **NEW_DATE},
    ),
    "nothing-changes": Row(
        "overwritten between two ranges; nothing tells", SECOND_IS_ANOTHER, TWO, headers=NOTHING, staged=NOTHING
    ),
    "weak": Row("weak ETag, not overwritten", ranges=TWO, headers={"ETag": 'W/"1"'}),
    "weak-get": Row("strong ETag on HEAD, weak on GET", (Fault(FaultKind.WEAK_ETAG),), TWO),
    **{
        value: Row(f"stored with Content-Encoding {value}", ranges=TWO, headers={"Content-Encoding": value})
        for value in ("gzip", "zstd", "utf-8", "aws-chunked")
    },
    "compressed": Row("compressed on the way", (Fault(FaultKind.COMPRESSED),)),
    "whole-range": Row("range of the whole object answered with 200", ALWAYS_WHOLE, WHOLE, size=SMALL),
    "no-if-match": Row("If-Match refused (501)", NO_CONDITIONS, TWO),
    "head-refused": Row("HEAD refused (403)", NO_HEAD, TWO),
    "presigned": Row("presigned URLs refused", ranges=TWO, front="presigned"),
    "head-length": Row("HEAD without Content-Length", ranges=TWO, front="no length"),
    "https": Row("http redirected to https (301)", ranges=TWO, front="redirects"),
    "node": Row("GETs redirected to another port (307)", ranges=TWO, front="redirected GETs"),
    "bare-lf": Row("lines of the head end with LF alone", ranges=TWO, front="bare LF"),
    "trickle": Row("body trickles, a byte each 0.1 s", _first(FaultKind.TRICKLE, after_bytes=300_000, seconds=0.1)),
}  # fmt: skip

NOTES: Final = f"""\
The fault strikes the first GET only, where nothing else is said. The libraries have their default settings, and
{LIMIT_S} s for an attempt. GETs are all that the server got for it, those that failed too.

- right: the bytes are those of the object.
- not noticed: so they are here, but the response said that they were others, or did not say what they were.
- WRONG BYTES accepted: shorter, longer or different ones were returned, and no error.
- error: the exception's class.
- hung: neither bytes nor an error in {LIMIT_S} s.

mpreader: RangeFetcher.fetch; s3torchconnector: the range_based reader; obstore: get_ranges; boto3: get_object with a
Range, and read() of its body; s3fs: cat_ranges. Two reads: of one reader that was opened before; obstore has
open_reader, mpreader its range_based reader, s3fs open(), boto3 none: it is for the caller to pass IfMatch.

Where nothing tells two versions of the same size apart (no ETag, no Last-Modified), no client can notice. A body that
is compressed on the way, though the request did not allow that, has other bytes than the range.

After a reset s3torchconnector fetches all of the part anew, so that its bytes are of one version; obstore resumes, and
compares the ETags. s3torchconnector's reader returns zeros in place of what is missing from a body that is too short.
Each of its reads is a request of its own; the parts of one request, more than 8 MiB, are fetched with If-Match.
"""


def main() -> None:
    options = _parser().parse_args()
    if options.one:
        _run_one(*options.one)
        return
    table = _compare()
    print(f"{_plain(table)}\n\n{NOTES}", end="")
    if options.markdown:
        options.markdown.write_text(f"# {__doc__.splitlines()[0]}\n\n{_markdown(table)}\n\n{NOTES}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where to write the table as Markdown")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "FAULT"), help=f"{', '.join(PEERS)}; {', '.join(ROWS)}")
    return parser


# -- one attempt, in a process of its own


def _run_one(peer_name: str, row_name: str) -> None:
    row = ROWS[row_name]
    with FaultServer({PATH: OLD}, row.faults, tls=row.front == "redirects") as server, _front(row, server) as front:
        server.put(PATH, OLD[: row.size], row.headers)
        server.stage(PATH, NEW, row.staged)
        # Set before the library is imported and makes its client.
        os.environ.update(server.environment())
        if front is not None:
            os.environ.update(AWS_ENDPOINT_URL=front.url, AWS_ENDPOINT_URL_S3=front.url)
        outcome = _outcome(PEERS[peer_name](), row, server)
        for request in server.requests:
            condition, struck = request.headers.get("if-match"), request.fault.kind.name if request.fault else "-"
            print(f"{request.method} {request.range} If-Match: {condition}; status {request.status}, fault {struck}")
        gets = len(_gets(server)) if front is None else sum(method == "GET" for method, _ in front.requests)
        print(f"{outcome} ({gets} GET{'s' * (gets != 1)})", flush=True)
        os._exit(0)  # a library that hangs would keep the process from ending


@contextlib.contextmanager
def _front(row: Row, server: FaultServer) -> Iterator[Front | None]:
    if not row.front:
        yield None
        return
    with Front(row.front, server.endpoint_url) as front:
        yield front


def _outcome(peer: Peer, row: Row, server: FaultServer) -> str:
    # In a thread, since nothing else ends the wait for a library that hangs.
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_attempt(peer, row, server)), daemon=True).start()
    try:
        return answers.get(timeout=LIMIT_S)
    except queue.Empty:
        return "hung"


def _attempt(peer: Peer, row: Row, server: FaultServer) -> str:
    try:
        pieces = _overwritten(peer, row.ranges, server) if row.overwrites else peer.fetch(row.ranges)
    except Exception as error:  # noqa: BLE001  # its class is the result
        print(f"{type(error).__module__}.{type(error).__qualname__}: {error}")
        return f"error: {type(error).__name__}"
    got, wanted = b"".join(pieces), b"".join(OLD[start:end] for start, end in row.ranges)
    if got != wanted:
        how = "different" if len(got) == len(wanted) else "shorter" if len(got) < len(wanted) else "longer"
        return f"WRONG BYTES accepted: {how}"
    return "not noticed" if row.is_lie and _accepts_lie(row, server) else "right"


def _accepts_lie(row: Row, server: FaultServer) -> bool:
    """True if bytes were taken from a response with a fault, and not all of the range was fetched anew."""
    gets = _gets(server)
    was_begun_anew = len(gets) > len(row.ranges) and gets[-1].range == gets[0].range
    return gets[-1].fault is not None and not was_begun_anew


def _overwritten(peer: Peer, ranges: Ranges, server: FaultServer) -> list[bytes]:
    """Read the first range, overwrite the object, read the second one with the same reader."""
    read, (first, second) = peer.open(), ranges
    before = read(*first)
    server.put(PATH, NEW)
    return [before, read(*second)]


def _gets(server: FaultServer) -> list[FaultedRequest]:
    return [request for request in server.requests if request.method == "GET"]


# -- all of them


def _compare() -> Table:
    attempts = [(peer, row) for row in ROWS for peer in PEERS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(lambda attempt: _run_apart(*attempt), attempts))
    sys.path.append(str(S3FS_FOLDER))  # for its version
    head = ["", *(f"{name} {version(name)}" for name in PEERS)]
    # map() keeps the order of the attempts: row by row, and within a row peer by peer.
    lines = [outcomes[first : first + len(PEERS)] for first in range(0, len(outcomes), len(PEERS))]
    return [head, *([row.title, *line] for row, line in zip(ROWS.values(), lines, strict=True))]


def _run_apart(peer_name: str, row_name: str) -> str:
    """Make an attempt in a process without the user's settings; returns the last line that it prints."""
    # A user's AWS_PROFILE or MPREADER_WORKERS would not be "default settings".
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MPREADER_"))}
    command = [sys.executable, __file__, "--one", peer_name, row_name]
    return subprocess.check_output(command, env=environment, text=True).splitlines()[-1]


def _plain(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def _markdown(table: Table) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [table[0], ["---"] * len(table[0]), *table[1:]])


if __name__ == "__main__":
    main()
