"""Sources of a fetcher: makes the source of each URI, and owns the one S3 client that they share.

The engine of the fetchers and the slice reader of the fsspec file system each have a :class:`Sources`. It must not read
objects, nor use a pool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from mpreader.config import S3ClientConfig
from mpreader.pool.source import ObjectVersion, Source
from mpreader.sources.uri import source_of
from mpreader.sources.versions import PinnedSource

if TYPE_CHECKING:
    from mpreader.readers.client import S3Client
    from mpreader.sources.network import Headers

__all__ = ["Sources"]


class Sources:
    """Maker of sources from URIs: ``s3://bucket/key`` or an http(s) URL. Thread-safe.

    Args:
        s3client_config: Settings of the S3 client.
        known: Ready-made sources by name: such a name is not parsed as a URI. The fsspec file system passes its files
            by their paths, each pinned to the version that it wants to read.
        on_client_needed: Called before a source is made that needs the S3 client. Making the client takes 0.1 s, for
            the import of boto3: the callback can start other work that runs in the meantime.
        http_headers: Further headers for web servers; they are sent to the server that a URL names only.

    Raises:
        ConfigError: A header can't be sent.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig,
        known: Mapping[str, Source] | None = None,
        on_client_needed: Callable[[], object] = lambda: None,
        http_headers: Mapping[str, str] | None = None,
    ) -> None:
        self._s3client_config = s3client_config
        self._known = dict(known or {})
        self._http_headers: Headers = ()
        if http_headers:
            from mpreader.sources.network import checked_headers  # slow to import, and seldom needed

            self._http_headers = checked_headers(http_headers)
        self._on_client_needed = on_client_needed
        self._client: S3Client | None = None

    def client(self) -> S3Client:
        """Return the S3 client. It is made at the first call."""
        client = self._client  # close() leaves it in place, so that it can't become None meanwhile
        if client is None:
            from mpreader.readers.client import S3Client  # imports boto3, which http(s) sources don't need

            # Without a lock, because a lock that is held during a fork stays locked in the child. If two threads come
            # here at the same time, they make two clients, which share a session.
            client = self._client = S3Client(s3client_config=self._s3client_config)
        return client

    def source(self, uri: str) -> Source:
        """Make the source of a URI. Makes no request.

        Raises:
            ConfigError: ``uri`` is not the URI of an object.
        """
        if uri in self._known:
            return self._known[uri]
        return source_of(uri, self._client_of_source, self._s3client_config.max_attempts, self._http_headers)

    @contextlib.contextmanager
    def pinned(self, uri: str, version: ObjectVersion) -> Iterator[tuple[str, PinnedSource]]:
        """Read only one version of an object while the context is entered.

        Args:
            uri: URI of the object.
            version: The version.

        Returns:
            A name that stands for this version in place of the URI, and the source, which has the version with all that
            reads find out about it.

        Raises:
            ConfigError: ``uri`` is not the URI of an object.
        """
        source = PinnedSource(self.source(uri), version)
        name = f"pinned {id(source):x}"  # not the URI: others may read another version at the same time
        self._known[name] = source
        try:
            yield name, source
        finally:
            del self._known[name]

    def close(self) -> None:
        """Close the connections of the S3 client, which opens new ones when it is used again. Idempotent."""
        if self._client is not None:
            self._client.close()

    def _client_of_source(self) -> S3Client:
        self._on_client_needed()
        return self.client()
