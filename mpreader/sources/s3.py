"""S3Source: an object of S3 as a source of the pool.

It connects the S3 client, which signs URLs, with the settings of the network, and makes the workers' routes of both. It
makes no requests but the HEAD of ``open``.
"""

from __future__ import annotations

from mpreader.errors import AccessDenied, TransportError
from mpreader.pool.source import ObjectVersion, Refusal
from mpreader.pool.worker.messages import FailureKind
from mpreader.pool.worker.route import Route
from mpreader.s3.client import BaseS3Client
from mpreader.s3.failure import code_of
from mpreader.sources.network import proxy_for, route_to

__all__ = ["S3Source"]


class S3Source:
    """One object of S3. See :class:`mpreader.pool.source.Source`.

    Args:
        client: Client that makes the HEAD request and signs the routes.
        bucket: The object's bucket.
        key: The object's key.
    """

    # Not decided yet: the pool calls open(). A PinnedSource has a version here.
    version: ObjectVersion | None = None

    def __init__(self, client: BaseS3Client, bucket: str, key: str) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._in_headers = False  # of the last route: signed in headers, not in the query

    @property
    def bucket(self) -> str:
        """The object's bucket."""
        return self._bucket

    @property
    def key(self) -> str:
        """The object's key."""
        return self._key

    @property
    def uri(self) -> str:
        """``s3://bucket/key``."""
        return f"s3://{self._bucket}/{self._key}"

    @property
    def max_attempts(self) -> int:
        """Largest number of requests that are made for the same bytes."""
        return self._client.s3client_config.max_attempts

    def open(self) -> ObjectVersion:
        """Request the object's present version from S3, with one HEAD.

        Raises:
            ObjectMissing: There is no such bucket, or no such key in it.
            AccessDenied: There are no credentials, or they don't allow it.
            TransportError: The service could not be reached, or failed.
        """
        return self._client.head_object(self._bucket, self._key).version

    def route(self) -> Route:
        """Make a newly signed route, through the environment's proxy if it names one. Makes no request to S3.

        Raises:
            AccessDenied: There are no credentials.
            ConfigError: The proxy is of a kind that the workers can't use.
        """
        self._in_headers = self._client.signs_in_headers(self._bucket)
        sign = self._client.sign_headers if self._in_headers else self._client.presign
        signed = sign(self._bucket, self._key)
        # The proxy depends on scheme and host only, so proxy_for gets no more. The whole URL is a secret, and if
        # proxy_for raised, a traceback that shows local variables would show it.
        return route_to(signed.url, signed.headers, proxy_for(signed.origin), signed.ca_file)

    def other_route(self, refusal: Refusal) -> Route | None:
        """Make a route with a signature in headers, or for another region, if boto3's own GET passes with it.

        Returns:
            The route; None without signatures, of which there is only one kind, and where boto3's GET is refused with
            the same code: then the refusal of the worker's GET stands.

        Raises:
            AccessDenied: The GET is refused in this way, too, or no other way is left.
            TransportError: As for :meth:`open`.
        """
        config = self._client.s3client_config
        if config.unsigned:
            return None
        in_headers = self._in_headers  # here, since another read of this source may make a route meanwhile
        # Another source of the bucket may have found out already.
        if not in_headers and self._client.signs_in_headers(self._bucket):
            return self.route()
        try:
            if self._client.explain_refusal(self._bucket, self._key, in_headers=in_headers):
                return self.route()
        except TransportError as error:
            if isinstance(error, AccessDenied) and code_of(error) == refusal.code:
                return None  # for the same reason: the worker's refusal, which is about a range, says all
            message = f"{error}; a worker was told {refusal.detail}"
            raise type(error)(message, bucket=self._bucket, key=self._key, attempts=error.attempts) from error.__cause__
        advice = "GETs of boto3, which are signed in the same way, pass: look at what stands between, such as a proxy"
        if config.signing == "query":
            advice = 'GETs that are signed in headers pass: set S3ClientConfig(signing="auto") or "headers"'
        kind = AccessDenied if refusal.kind in (FailureKind.DENIED, FailureKind.EXPIRED) else TransportError
        message = f"{self.uri}: the service refuses GETs of the workers: {refusal.detail}; {advice}"
        raise kind(message, bucket=self._bucket, key=self._key, attempts=1)

    def __repr__(self) -> str:
        return f"<S3Source {self.uri}>"
