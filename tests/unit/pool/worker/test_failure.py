"""Refusals of a server, as the coordinator hears of them."""

from __future__ import annotations

import socket

import pytest

from mpreader.pool.worker.failure import GetFailed, check_response
from mpreader.pool.worker.http import HttpSocket
from mpreader.pool.worker.messages import FailureKind, Fetch
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion

FETCH = Fetch(1, Route(False, "host", 80, "/key"), ObjectVersion(100, ""), 0, 100, 0, 0)


def refusal(head: str, body: str = "") -> GetFailed:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode("latin-1"))
        with pytest.raises(GetFailed) as caught:
            check_response(HttpSocket(ours).read_response(), FETCH)
    return caught.value


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("999999", 60.0), ("\u00b2", 0.0), ("soon", 0.0), ("-1", 0.0)]
)
def test_busy_server_is_waited_for_as_long_as_it_wishes_but_a_minute(header: str, seconds: float) -> None:
    failure = refusal(f"503 Slow Down\r\nRetry-After: {header}", "<Error><Code>SlowDown</Code></Error>")
    assert (failure.kind, failure.retry_after_s) == (FailureKind.BUSY, seconds)
    assert "SlowDown" in failure.detail


def test_error_document_may_echo_secrets_that_are_not_passed_on() -> None:
    body = "<Error><Code>AccessDenied</Code><StringToSign>sesame</StringToSign></Error>"
    failure = refusal("403 Forbidden", body)
    assert (failure.kind, "sesame" in failure.detail) == (FailureKind.DENIED, False)
