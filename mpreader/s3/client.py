"""S3Client: the requests that mpreader makes of S3."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import ClientError

from mpreader.config import S3ClientConfig, check_type
from mpreader.pool.worker.route import Route
from mpreader.s3.checksum import StoredChecksums
from mpreader.s3.failure import Target, translated
from mpreader.s3.objects import ListObjectsPage, ObjectInfo
from mpreader.s3.session import Session, shared_session
from mpreader.s3.stream import PinnedObject
from mpreader.s3.writer import S3Writer
from mpreader.sources.network import route_to

if TYPE_CHECKING:
    from mpreader.readers.base import ObjectInfo as HasSize
    from mpreader.readers.base import S3Reader
    from mpreader.readers.protocols import S3ReaderConstructorProtocol

__all__ = ["S3Client"]

# Longer than any load of an object takes; the pool makes new ones long before.
_URL_EXPIRY_S: Final = 3600
_UNEXPLAINED: Final = frozenset({301, 400, 403, 404})


class S3Client:
    """Access to S3. Thread-safe; connects when first used, anew after a fork or unpickling.

    Args:
        region: AWS region. None: that of ``s3client_config``, else the environment's. Buckets of other regions are
            followed.
        s3client_config: How S3 is reached. None: the defaults.
        endpoint: URL of an S3-compatible service. None: that of ``s3client_config``, else the environment's.

    Raises:
        ConfigError: ``region`` or ``endpoint`` is malformed.
        TypeError: ``s3client_config`` is something else.
    """

    def __init__(
        self,
        region: str | None = None,
        *,
        s3client_config: S3ClientConfig | None = None,
        endpoint: str | None = None,
    ) -> None:
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

    def get_object(
        self,
        bucket: str,
        key: str,
        *,
        object_info: HasSize | None = None,
        reader_constructor: S3ReaderConstructorProtocol | None = None,
    ) -> S3Reader:
        """Make a reader of one object; all that it reads is of the version that it sees first.

        Args:
            bucket: The object's bucket.
            key: The object's key.
            object_info: What a HEAD or a listing told of the object, to save the reader a request.
            reader_constructor: Makes the reader. None: ``S3ReaderConstructor.default()``.
        """
        from mpreader.readers.kinds import S3ReaderConstructor

        pinned = PinnedObject(self, bucket, key, object_info)
        make = reader_constructor or S3ReaderConstructor.default()
        return make(bucket=bucket, key=key, get_object_info=pinned.info, get_stream=pinned.stream)

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
            prefix: What the keys begin with.
            delimiter: Keys with this text behind the prefix are summed up as common prefixes. "": none are.
            max_keys: Most objects and prefixes of one page.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        parameters: dict[str, Any] = {"Prefix": prefix, "Delimiter": delimiter, "MaxKeys": max_keys}
        while True:
            answer = self.call("list_objects_v2", bucket, **parameters)
            yield ListObjectsPage.of(answer)
            if not answer.get("IsTruncated"):
                return
            parameters["ContinuationToken"] = answer["NextContinuationToken"]

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

    def route(self, bucket: str, key: str) -> Route:
        """Make a presigned URL for GETs of an object, as a route for the workers. Makes no request.

        Raises:
            AccessDenied: There are no credentials.
        """
        parameters = {"Bucket": bucket, "Key": key, **self._payer()}
        session = self._session
        with translated(self._target(bucket, key)):
            boto = session.client_for(bucket)
            url = boto.generate_presigned_url("get_object", Params=parameters, ExpiresIn=_URL_EXPIRY_S)
            # What the signature names must be sent as it was signed.
            headers = (("x-amz-request-payer", "requester"),) if self._config.requester_pays else ()
            ca_file = session.ca_file() if url.startswith("https:") else None
            return route_to(url, headers, session.proxy_for(url), ca_file)

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
            answer: dict[str, Any] = method(Bucket=bucket, **parameters, **self._payer())
            return answer

    def close(self) -> None:
        """Close all connections; the next request opens new ones."""
        self._session.close()

    def __repr__(self) -> str:
        return f"<S3Client region={self._config.region} endpoint={self._config.endpoint_url}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), s3client_config=self._config), ()

    @property
    def _session(self) -> Session:
        # In a forked child the parent's sockets and locks are of no use.
        if self._own_session.pid != os.getpid():
            self._use_session()
        return self._own_session

    def _use_session(self) -> None:
        self._own_session = shared_session(self._config)
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
            # The answer to a HEAD has no body that says why. That to a GET has.
            with contextlib.closing(boto.get_object(**parameters, Range="bytes=0-0")["Body"]):
                raise
