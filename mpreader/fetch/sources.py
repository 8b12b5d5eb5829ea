"""Sources of a fetcher: made from URIs, with one S3 client for all.

The engine of the fetchers and the fsspec file system each own one :class:`Sources`. It reads no bytes and knows no
pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mpreader.config import S3ClientConfig
from mpreader.pool.source import Source
from mpreader.sources.uri import source_of

if TYPE_CHECKING:
    from mpreader.readers.client import S3Client

__all__ = ["Sources"]


class Sources:
    """Sources by URI: ``s3://bucket/key`` or an http(s) URL. Thread-safe.

    Args:
        s3client_config: Settings of the S3 client.
        known: Sources to use for these names, such as ones whose version is known already.
        on_client_needed: Called before a source is made that needs the S3 client. A client that is not there yet takes
            0.2 s, with the import of boto3; other work can be begun before that.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig,
        known: Mapping[str, Source] | None = None,
        on_client_needed: Callable[[], object] = lambda: None,
    ) -> None:
        self._s3client_config = s3client_config
        self._known = known or {}
        self._on_client_needed = on_client_needed
        self._client: S3Client | None = None

    def client(self) -> S3Client:
        """Return the S3 client, which is made when it is first needed."""
        client = self._client
        if client is None:
            from mpreader.readers.client import S3Client

            # Without a lock, which a fork could leave closed: two clients would share a session all the same.
            client = self._client = S3Client(s3client_config=self._s3client_config)
        return client

    def source(self, uri: str) -> Source:
        """Make a source, without a request.

        Raises:
            ConfigError: ``uri`` is no URI of an object.
        """
        if uri in self._known:
            return self._known[uri]
        return source_of(uri, self._client_of_source, self._s3client_config.max_attempts)

    def close(self) -> None:
        """Close the connections of the S3 client; a later use opens new ones. Idempotent."""
        if self._client is not None:
            self._client.close()

    def _client_of_source(self) -> S3Client:
        self._on_client_needed()
        return self.client()
