"""BaseS3Client: the requests to S3 of the main process, and the signatures for those of the workers.

Users have :class:`mpreader.readers.client.S3Client`, a subclass that also makes readers; sources use it to find and
presign objects. A client is cheap to make: the slow parts, boto3's clients, belong to a
:class:`~mpreader.s3.session.Session` that all clients of equal settings share. No credential may leave this package,
except inside of a signature.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

from mpreader.config import S3ClientConfig, check_type
from mpreader.errors import PlanError
from mpreader.s3.checksum import StoredChecksums
from mpreader.s3.facts import HeadedClient, request_facts
from mpreader.s3.failure import Target, Unusable, translated
from mpreader.s3.objects import ListObjectsPage, ObjectInfo
from mpreader.s3.session import Session, shared_session
from mpreader.s3.signing import Headers
from mpreader.s3.writer import S3Writer

__all__ = ["BaseS3Client", "PresignedUrl"]

# Longer than the load of any object takes. If a URL does expire, the pool asks for a new one.
_URL_EXPIRY_S: Final = 3600
# Fields of a listing, one of which every service sends. A page of HTML has none, and is no empty listing.
_LISTING_FIELDS: Final = frozenset({"Name", "IsTruncated", "KeyCount", "MaxKeys", "Contents", "CommonPrefixes"})


class PresignedUrl(NamedTuple):
    """URL for GETs of one object, signed in its query or in headers. A secret: whoever has it can read the object.

    Attributes:
        url: The URL, percent-encoded; its query may hold the signature.
        headers: Headers that every request must carry: the signature, or what is part of it.
        ca_file: PEM file, or directory, of the certificate authorities to trust; None where the URL is not https.
    """

    url: str
    headers: Headers
    ca_file: str | None

    @property
    def origin(self) -> str:
        """Scheme, host and port of the URL, which are not secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def __repr__(self) -> str:
        # The repr of a named tuple would show the signature in logs and tracebacks.
        return f"PresignedUrl({self.origin})"


class BaseS3Client:
    """Client of S3. Thread-safe. It connects at its first request, and again after a fork or after unpickling."""

    def __init__(
        self,
        region: str | None = None,
        *,
        s3client_config: S3ClientConfig | None = None,
        endpoint: str | None = None,
    ) -> None:
        """Store the settings; makes no request.

        Args:
            region: AWS region. None: that of ``s3client_config``, else the environment's. Buckets of other regions
                are followed.
            s3client_config: Settings of S3. None: the defaults.
            endpoint: URL of an S3-compatible service. None: that of ``s3client_config``, else the environment's.

        Raises:
            ConfigError: ``region`` or ``endpoint`` is malformed.
            TypeError: ``s3client_config`` is neither None nor an ``S3ClientConfig``.
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
        """Region of the settings; None: the environment's."""
        return self._config.region

    @property
    def s3client_config(self) -> S3ClientConfig:
        """The settings in force."""
        return self._config

    def head_object(self, bucket: str, key: str) -> ObjectInfo:
        """Request an object's size and version, with one HEAD, and with a GET where HEAD is refused or no use.

        Raises:
            ObjectMissing: There is no such bucket, or no such key in it.
            AccessDenied: There are no credentials, or they don't allow it.
            TransportError: The service could not be reached, or failed.
        """
        with translated(self._target(bucket, key)):
            return ObjectInfo.of_head(key, self._facts(bucket, key))

    def checksums(self, bucket: str, key: str) -> StoredChecksums:
        """Request the checksums of a whole object that S3 has stored.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        with translated(self._target(bucket, key)):
            return StoredChecksums.of_head(bucket, self._facts(bucket, key, ChecksumMode="ENABLED"))

    def list_objects(
        self, bucket: str, prefix: str = "", delimiter: str = "", max_keys: int = 1000
    ) -> Iterator[ListObjectsPage]:
        """List the objects whose keys begin with ``prefix``, in the order of their keys.

        Args:
            bucket: The bucket.
            prefix: Beginning of the keys.
            delimiter: Text such as "/". Keys that have it behind the prefix are summed up as common prefixes, in place
                of being listed. "": every key is listed.
            max_keys: Most objects and prefixes of one page.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        parameters: dict[str, Any] = {"Prefix": prefix, "Delimiter": delimiter, "MaxKeys": max_keys}
        seen: set[str] = set()
        while True:
            response = self.call("list_objects_v2", bucket, **parameters)
            with translated(self._target(bucket, prefix)):
                page, token = ListObjectsPage.of(response), response.get("NextContinuationToken")
                if not _LISTING_FIELDS & response.keys():
                    raise Unusable("the answer is no listing")
                if response.get("IsTruncated") and (not token or token in seen):
                    raise Unusable("the listing goes on, but the service does not tell where")
            yield page  # may be empty without being the last one
            if not response.get("IsTruncated"):
                return
            seen.add(str(token))
            parameters["ContinuationToken"] = token

    def put_object(self, bucket: str, key: str, storage_class: str | None = None) -> S3Writer:
        """Open a new object for writing; the object exists once the writer is closed.

        Args:
            bucket: The object's bucket.
            key: The object's key.
            storage_class: S3's name of the storage class, such as ``"STANDARD_IA"``. None: the service's default.
        """
        return S3Writer(self, bucket, key, storage_class)

    def copy_object(self, src_bucket: str, src_key: str, dst_bucket: str, dst_key: str) -> None:
        """Copy an object of any size within S3.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        # Checks the source first. Without this an error of the copy would not tell if source or destination is meant.
        with translated(self._target(src_bucket, src_key)):
            facts = self._facts(src_bucket, src_key)
        with translated(self._target(dst_bucket, dst_key)):
            # boto3's managed copy, which copies large objects in parts: one CopyObject request takes 5 GiB at most.
            self._session.client_for(dst_bucket).copy(
                {"Bucket": src_bucket, "Key": src_key},
                dst_bucket,
                dst_key,
                ExtraArgs=self._payer(),
                SourceClient=cast(Any, HeadedClient(self._session.client_for(src_bucket), facts)),
            )

    def delete_object(self, bucket: str, key: str) -> None:
        """Delete an object. It is not an error if there is none.

        Raises:
            TransportError: As for :meth:`head_object`.
        """
        self.call("delete_object", bucket, Key=key)

    def presign(self, bucket: str, key: str) -> PresignedUrl:
        """Presign a URL for GETs of an object, valid for an hour. Makes no request to S3.

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

    def sign_headers(self, bucket: str, key: str) -> PresignedUrl:
        """Sign GETs of an object in their headers, as boto3 signs its own; valid for 15 minutes where S3's rule holds.

        Makes no request to S3, but for the session of a directory bucket.

        Raises:
            AccessDenied: There are no credentials.
        """
        session = self._session
        with translated(self._target(bucket, key)):
            boto = session.client_for(bucket)
            url, headers = session.header_signer.sign(boto, Bucket=bucket, Key=key, **self._payer())
            return PresignedUrl(url, headers, session.ca_file() if url.startswith("https:") else None)

    @property
    def unconditional_buckets(self) -> set[str]:
        """Buckets whose service refuses If-Match though the object is the right one; streams add to it."""
        return self._session.unconditional_buckets

    def signs_in_headers(self, bucket: str) -> bool:
        """Return True if the workers' requests are to be signed by ``sign_headers``, False if by ``presign``."""
        return not self._config.unsigned and self._session.signs_in_headers(bucket)

    def explain_refusal(self, bucket: str, key: str, *, in_headers: bool) -> bool:
        """Make the GET that workers were refused, by boto3; if it passes, later ones of the workers are made like it.

        Args:
            bucket: The object's bucket.
            key: The object's key.
            in_headers: True if the refused GET was signed in its headers.

        Returns:
            True if it passes, and the workers' requests will now be signed in another way, or for another region.

        Raises:
            TransportError: It is refused, too; the error has the service's reason.
        """
        session = self._session
        before = session.region_of(bucket)
        with contextlib.suppress(PlanError):  # the object is empty by now, which shows that it may be read
            self.call("get_object", bucket, Key=key, Range="bytes=0-0")["Body"].close()
        if session.region_of(bucket) != before:  # boto3 has followed the bucket to its region
            return True
        if self._config.signing != "auto" or in_headers:
            return False
        session.remember_headers(bucket)
        return True

    def call(
        self, operation: str, bucket: str, *, range: tuple[int, int] | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """Make a request by the name of boto3's method.

        Args:
            operation: Name of the method, such as ``"get_object"``.
            bucket: The bucket.
            range: Requested bytes, end exclusive. Only named in errors: ``parameters`` must have the Range as well.
            parameters: The method's other parameters.

        Raises:
            ConfigError: A profile, region or name is wrong.
            PlanError: The range lies outside of the object.
            TransportError: The service refused, or could not be reached.
        """
        with translated(self._target(bucket, parameters.get("Key", ""), range)):
            method = getattr(self._session.client_for(bucket), operation)
            response: dict[str, Any] = method(Bucket=bucket, **parameters, **self._payer())
            status = response["ResponseMetadata"]["HTTPStatusCode"]
            if not 200 <= status < 300:  # botocore takes 300 for a success
                raise Unusable(f"the service answers HTTP {status}")
            return response

    def close(self) -> None:
        """Close all connections; the next request opens new ones."""
        self._session.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} region={self._config.region} endpoint={self._config.endpoint_url}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the settings: connections and locks can't be pickled, and credentials must not be.
        return partial(type(self), s3client_config=self._config), ()

    @property
    def _session(self) -> Session:
        # After a fork the session is still the parent's: both processes would mix their bytes on one socket, and a lock
        # may have been copied while a thread of the parent held it.
        if self._own_session.pid != os.getpid():
            self._use_session()
        return self._own_session

    def _use_session(self) -> None:
        self._own_session = shared_session(self._config)
        # A client need not be closed: when the last client of a session is garbage-collected, the session closes its
        # connections.
        weakref.finalize(self, self._own_session.release)

    def _target(self, bucket: str, key: str, range: tuple[int, int] | None = None) -> Target:
        return Target(bucket, key, self._session.where, self._config.max_attempts, range)

    def _payer(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self._config.requester_pays else {}

    def _facts(self, bucket: str, key: str, **of_head: Any) -> dict[str, Any]:
        parameters = {"Bucket": bucket, "Key": key, **self._payer()}
        return request_facts(self._session.client_for(bucket), parameters, **of_head)
