"""BaseS3Client: every request that mpreader's own process makes of S3, and the presigned URLs for its workers.

Clients are light: the slow parts, boto3's clients, belong to a :class:`~mpreader.s3.session.Session` that clients of
equal settings share. What the users have is :class:`mpreader.readers.client.S3Client`, which also makes readers.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from botocore.exceptions import ClientError

from mpreader.config import S3ClientConfig, check_type
from mpreader.s3.checksum import StoredChecksums
from mpreader.s3.failure import Target, translated
from mpreader.s3.objects import ListObjectsPage, ObjectInfo
from mpreader.s3.session import Session, shared_session
from mpreader.s3.writer import S3Writer

__all__ = ["BaseS3Client", "PresignedUrl"]

# Longer than any load of an object takes; the pool makes new ones long before.
_URL_EXPIRY_S: Final = 3600
# Refusals of a HEAD whose reason only a GET is told: the response to a HEAD has no body.
_UNEXPLAINED: Final = frozenset({301, 400, 403, 404})


class PresignedUrl(NamedTuple):
    """A URL for GETs of one object. A secret: whoever has it can read the object until it expires.

    Attributes:
        url: The URL, percent-encoded; its query holds the signature.
        headers: Headers that every request must carry, as they were signed.
        ca_file: PEM file, or directory, of the certificate authorities to trust; None where the URL is not https.
    """

    url: str
    headers: tuple[tuple[str, str], ...]
    ca_file: str | None

    @property
    def origin(self) -> str:
        """Scheme, host and port of the URL, which are no secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def __repr__(self) -> str:
        return f"PresignedUrl({self.origin})"


class BaseS3Client:
    """Requests of S3. Thread-safe; connects when first used, anew after a fork or unpickling."""

    def __init__(
        self,
        region: str | None = None,
        *,
        s3client_config: S3ClientConfig | None = None,
        endpoint: str | None = None,
    ) -> None:
        """Take over the settings; makes no request.

        Args:
            region: AWS region. None: that of ``s3client_config``, else the environment's. Buckets of other regions
                are followed.
            s3client_config: Settings of S3. None: the defaults.
            endpoint: URL of an S3-compatible service. None: that of ``s3client_config``, else the environment's.

        Raises:
            ConfigError: ``region`` or ``endpoint`` is malformed.
            TypeError: ``s3client_config`` is something else.
        """
        check_type("s3client_config", s3client_config, S3ClientConfig)
        config = s3client_config or S3ClientConfig()
        self._config = replace(
            config,
            region=config.region if region is None else region,
            endpoint_url=config.endpoint_url if endpoint is None else endpoint,
        )
        self._use_session()

    @property
    def region(self) -> str | None:
        """The region that was asked for; None: the environment's."""
        return self._config.region

    @property
    def s3client_config(self) -> S3ClientConfig:
        """The settings in force."""
        return self._config

    def head_object(self, bucket: str, key: str) -> ObjectInfo:
        """Ask for an object's size and version.

        Raises:
            ObjectMissing: There is no such bucket, or no such key in it.
            AccessDenied: There are no credentials, or they are not good for this.
            TransportError: The service could not be asked, or failed.
        """
        with translated(self._target(bucket, key)):
            return ObjectInfo.of_head(key, self._head(bucket, key))

    def checksums(self, bucket: str, key: str) -> StoredChecksums:
        """Ask which checksums of a whole object S3 has stored.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        return StoredChecksums.of_head(bucket, self.call("head_object", bucket, Key=key, ChecksumMode="ENABLED"))

    def list_objects(
        self, bucket: str, prefix: str = "", delimiter: str = "", max_keys: int = 1000
    ) -> Iterator[ListObjectsPage]:
        """List the objects whose keys begin with ``prefix``, in the order of their keys.

        Args:
            bucket: The bucket.
            prefix: Beginning of the keys.
            delimiter: Keys with this text behind the prefix are summed up as common prefixes. "": none are.
            max_keys: Most objects and prefixes of one page.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        parameters: dict[str, Any] = {"Prefix": prefix, "Delimiter": delimiter, "MaxKeys": max_keys}
        while True:
            response = self.call("list_objects_v2", bucket, **parameters)
            yield ListObjectsPage.of(response)  # may be empty, and still not the last one
            if not response.get("IsTruncated"):
                return
            parameters["ContinuationToken"] = response["NextContinuationToken"]

    def put_object(self, bucket: str, key: str, storage_class: str | None = None) -> S3Writer:
        """Open a new object for writing; it is there once the writer is closed.

        Args:
            bucket: The object's bucket.
            key: The object's key.
            storage_class: Such as ``"STANDARD_IA"``. None: the service's default.
        """
        return S3Writer(self, bucket, key, storage_class)

    def copy_object(self, src_bucket: str, src_key: str, dst_bucket: str, dst_key: str) -> None:
        """Copy an object of any size within S3.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        self.head_object(src_bucket, src_key)  # or else an error could not tell source from destination
        with translated(self._target(dst_bucket, dst_key)):
            # boto3's own transfer copies in parts where it must: one CopyObject takes 5 GiB at most.
            self._session.client_for(dst_bucket).copy(
                {"Bucket": src_bucket, "Key": src_key},
                dst_bucket,
                dst_key,
                ExtraArgs=self._payer(),
                SourceClient=self._session.client_for(src_bucket),
            )

    def delete_object(self, bucket: str, key: str) -> None:
        """Delete an object; one that is not there is no error.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        self.call("delete_object", bucket, Key=key)

    def presign(self, bucket: str, key: str) -> PresignedUrl:
        """Presign a URL for GETs of an object, good for an hour. Makes no request.

        Raises:
            AccessDenied: There are no credentials.
        """
        parameters = {"Bucket": bucket, "Key": key, **self._payer()}
        session = self._session
        with translated(self._target(bucket, key)):
            boto = session.client_for(bucket)
            url = boto.generate_presigned_url("get_object", Params=parameters, ExpiresIn=_URL_EXPIRY_S)
            headers = (("x-amz-request-payer", "requester"),) if self._config.requester_pays else ()
            return PresignedUrl(url, headers, session.ca_file() if url.startswith("https:") else None)

    def call(
        self, operation: str, bucket: str, *, range: tuple[int, int] | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """Make a request by the name of boto3's method.

        Args:
            operation: Name of the method, such as ``"get_object"``.
            bucket: The bucket.
            range: Bytes that are asked for, to be named in errors; end exclusive.
            parameters: The method's other parameters.

        Raises:
            ConfigError: A profile, region or name is wrong.
            PlanError: The range lies outside of the object.
            TransportError: The service refused, or could not be reached.
        """
        with translated(self._target(bucket, parameters.get("Key", ""), range)):
            method = getattr(self._session.client_for(bucket), operation)
            response: dict[str, Any] = method(Bucket=bucket, **parameters, **self._payer())
            return response

    def close(self) -> None:
        """Close all connections; the next request opens new ones."""
        self._session.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} region={self._config.region} endpoint={self._config.endpoint_url}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the settings: connections and locks can't travel, and credentials must not.
        return partial(type(self), s3client_config=self._config), ()

    @property
    def _session(self) -> Session:
        # In a forked child the parent's sockets and locks are of no use.
        if self._own_session.pid != os.getpid():
            self._use_session()
        return self._own_session

    def _use_session(self) -> None:
        self._own_session = shared_session(self._config)
        # A client need not be closed: the last one that is collected closes the connections.
        weakref.finalize(self, self._own_session.release)

    def _target(self, bucket: str, key: str, range: tuple[int, int] | None = None) -> Target:
        return Target(bucket, key, self._session.where, self._config.max_attempts, range)

    def _payer(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self._config.requester_pays else {}

    def _head(self, bucket: str, key: str) -> Any:
        boto = self._session.client_for(bucket)
        parameters: dict[str, Any] = {"Bucket": bucket, "Key": key, **self._payer()}
        try:
            return boto.head_object(**parameters)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in _UNEXPLAINED:
                raise
            # The GET raises an error with the reason; if it is allowed, that of the HEAD must do.
            with contextlib.closing(boto.get_object(**parameters, Range="bytes=0-0")["Body"]):
                raise
