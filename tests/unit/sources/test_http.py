"""HttpSource, as far as no server is needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpreader import ConfigError
from mpreader.sources.http import HttpSource


def test_source_with_an_unreadable_authority_is_a_config_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    with pytest.raises(ConfigError, match="REQUESTS_CA_BUNDLE"):
        HttpSource("https://127.0.0.1:1/key").open()


@pytest.mark.parametrize("url", ["", "ftp://host/x", "s3://bucket/key", "http://", "https:///x", "http://h:99999/"])
def test_source_refuses_what_is_no_http_url(url: str) -> None:
    with pytest.raises(ConfigError):
        HttpSource(url)


def test_config_error_of_a_url_hides_its_password() -> None:
    with pytest.raises(ConfigError) as caught:
        HttpSource("ftp://me:password@host/x?token=secret")
    assert "password" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("https://Store.example/dir/key", "store.example", "/dir/key"),
        ("https://store.example:443/key?token=secret#part", "store.example", "/key"),
        ("HTTP://store.example:80", "store.example", "/"),
        ("http://store.example:443/a b/ü", "store.example:443", "/a%20b/%C3%BC"),
        ("http://me:secret@[::1]:8080/key", "[::1]:8080", "/key"),
    ],
)
def test_source_is_named_by_host_and_path_and_by_nothing_secret(url: str, host: str, path: str) -> None:
    source = HttpSource(url, max_attempts=7)
    assert (source.bucket, source.key, source.max_attempts) == (host, path, 7)
    assert source.uri == f"{url.partition(':')[0].lower()}://{host}{path}"
    assert "secret" not in f"{source!r} {source.uri}"
