"""HTTP responses as they come off a socket: those that are understood, and the refusal of all others."""

from __future__ import annotations

import contextlib
import itertools
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpreader.pool.worker.http import MAX_HEAD_BYTES, HttpSocket, MalformedResponse, Response


def body_of(raw: bytes, most: int = 1 << 20) -> tuple[Response, bytes]:
    """Response that is parsed from what a server sends before it closes, and its body."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(raw)
        theirs.shutdown(socket.SHUT_WR)
        response = HttpSocket(ours).read_response()
        return response, response.read(most)


def test_response_tells_status_headers_and_body() -> None:
    raw = b'HTTP/1.1 206 P\r\nETag: "a"\r\nX-Two: 1\r\nx-two:2 \r\nEtag: "a"\r\nContent-Length: 5\r\n\r\nhelloBEYOND'
    response, body = body_of(raw)
    assert (response.status, response.length, response.is_chunked, response.will_close) == (206, 5, False, False)
    assert (response.header("etag"), response.header("x-two"), response.header("none", "default")) == (
        '"a"',
        "1, 2",
        "default",
    )
    assert body == b"hello"


def test_interim_responses_are_left_out() -> None:
    response, body = body_of(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert (response.status, body) == (200, b"ok")


@pytest.mark.parametrize(
    ("head", "will_close"),
    [
        ("HTTP/1.1 200 OK\r\nContent-Length: 0", False),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close", True),
        ("HTTP/1.0 200 OK\r\nContent-Length: 0", True),
        ("HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive", False),
        ("HTTP/1.1 200", True),  # the body ends with the connection
    ],
)
def test_response_tells_whether_the_connection_ends(head: str, will_close: bool) -> None:
    assert body_of(head.encode() + b"\r\n\r\n")[0].will_close is will_close


@given(data=st.binary(min_size=1, max_size=20_000), cuts=st.lists(st.integers(1, 5_000), min_size=1, max_size=20))
@settings(max_examples=30)
def test_chunked_body_is_what_was_cut(data: bytes, cuts: list[int]) -> None:
    raw, start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0
    for cut in [*cuts, len(data)]:
        if chunk := data[start : start + cut]:
            raw += b"%x;name=value\r\n%s\r\n" % (len(chunk), chunk)
        start += cut
    response, body = body_of(raw + b"0\r\nTrailer: x\r\n\r\n")
    assert response.length is None
    assert not response.will_close
    assert body == data


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/2 200\r\n\r\n",
        b"<html>\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nName : 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 10_000,
        b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * (MAX_HEAD_BYTES // 6 + 1),
    ],
)
def test_what_is_not_understood_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedResponse):
        body_of(raw)


heads = st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n"])


@given(head=heads, rest=st.binary(max_size=300))
@settings(max_examples=300)
def test_no_bytes_do_anything_but_be_read_or_refused(head: bytes, rest: bytes) -> None:
    with contextlib.suppress(MalformedResponse):
        body_of(head + rest)


@pytest.mark.parametrize(("target", "value"), [("/a\r\nX: y", "v"), ("/a", "v\nX: y"), ("/a", "v\0")])
def test_request_with_a_line_break_in_it_is_not_sent(target: str, value: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(ValueError, match="control character"):
            HttpSocket(ours).send_request("GET", target, [("If-Match", value)])
        ours.shutdown(socket.SHUT_WR)
        assert theirs.recv(100) == b""


def test_rest_of_a_connection_is_noticed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab")
        stream = HttpSocket(ours)
        assert stream.read_response().read(1) == b"a"
        assert stream.has_unread_bytes


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\nA: b\rc\r\n",
        b"HTTP/1.1 200 OK\r\nA: \0\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n",
        b"<html>hello",
        b"HTTP/2 200\r\n",
        b"HTTP/1.11",
        b"ICY 200 OK\r\n",
        b"\r\n",
        b"\x16\x03\x01",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\nok",
    ],
)
def test_what_can_not_become_a_response_is_refused_while_the_server_still_waits(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)  # which would be a TimeoutError
        theirs.sendall(raw)
        with pytest.raises(MalformedResponse):
            HttpSocket(ours).read_response().read(10)


_PLAIN = b'HTTP/1.1 206 Partial Content\r\nETag: "a:\xff"\r\nEmpty:\r\nTab:\ta\tb \r\nContent-Length: 2\r\n\r\nok'
_CHUNKED = b"HTTP/1.0 200\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\no\r\n1\r\nk\r\n0\r\nT: 1\r\n\r\n"


@given(
    raw=st.sampled_from([_PLAIN, b"HTTP/1.1 100 Continue\r\n\r\n" + _CHUNKED]),
    cuts=st.lists(st.integers(0, 120), max_size=6),
)
def test_response_is_the_same_however_it_is_cut_up(raw: bytes, cuts: list[int]) -> None:
    edges = sorted({0, *(min(cut, len(raw)) for cut in cuts), len(raw)})
    pieces = [raw[start:end] for start, end in itertools.pairwise(edges)]

    class Pieces:
        def recv(self, _: int) -> bytes:
            return pieces.pop(0) if pieces else b""

        def recv_into(self, into: memoryview, _: int, flags: int) -> int:
            assert not flags
            piece = pieces.pop(0) if pieces else b""
            into[: len(piece)] = piece[: len(into)]
            if piece[len(into) :]:
                pieces.insert(0, piece[len(into) :])
            return min(len(piece), len(into))

    response = HttpSocket(Pieces()).read_response()  # type: ignore[arg-type]
    assert response.read(2) == b"ok"
