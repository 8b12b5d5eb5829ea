"""Facts of an object: size and version, by a HEAD, or by a GET of its first byte where HEAD is refused or no use.

Used by :class:`mpreader.s3.client.BaseS3Client`, which translates the errors. Policies and proxies refuse HEAD though
they let GET pass, and some services answer it without the size. A refused HEAD has no body, and so no reason: where the
GET is refused as well, its error has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from mpreader.config import MAX_OBJECT_BYTES
from mpreader.pool.worker.failure import BUSY_STATUSES
from mpreader.pool.worker.partial_content import PartialContent
from mpreader.s3.credentials import ProviderFailed
from mpreader.s3.failure import Unusable

__all__ = ["HeadedClient", "request_facts"]


def request_facts(client: Any, parameters: Mapping[str, Any], **of_head: Any) -> dict[str, Any]:
    """Request the facts of an object.

    Args:
        client: boto3's client.
        parameters: Bucket, key and others that HEAD and GET have in common.
        of_head: Parameters of the HEAD alone.

    Returns:
        boto3's response to ``head_object``, or what it would be: ``ContentLength`` is the whole object's.

    Raises:
        ClientError: The service refused.
        BotoCoreError: There was no response.
        Unusable: The responses have no size.
    """
    try:
        response: dict[str, Any] = client.head_object(**parameters, **of_head)
        if _status_of(response) == 200 and _is_size(response.get("ContentLength")):
            return response
    except ClientError as error:
        if _status_of(error.response) in BUSY_STATUSES:  # boto3 has repeated it as often as it should
            raise
    except (BotoCoreError, ProviderFailed, MemoryError):
        raise
    except Exception:  # noqa: BLE001  # a header that botocore can't parse, which the GET may not have
        pass
    return _facts_of_get(client, parameters)


def _facts_of_get(client: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    try:
        response: dict[str, Any] = client.get_object(**parameters, Range="bytes=0-0")
    except ClientError as error:
        if _status_of(error.response) != 416:
            raise
        response = client.get_object(**parameters)  # an empty object has no first byte
    response["Body"].close()  # unread: a server that ignores the range sends the whole object
    size = _size_of(response)
    if not _is_size(size):
        raise Unusable("the service does not tell the object's size, neither to HEAD nor to GET")
    return {**response, "ContentLength": size}


def _size_of(response: Mapping[str, Any]) -> object:
    """Return the size of the whole object that a response to GET states; it may be no number."""
    range_text, length = response.get("ContentRange") or "", response.get("ContentLength")
    return PartialContent(_status_of(response), range_text, length).object_size


def _is_size(size: object) -> bool:
    return isinstance(size, int) and 0 <= size <= MAX_OBJECT_BYTES


def _status_of(response: Mapping[str, Any]) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class HeadedClient:
    """boto3's client for the source of a managed copy, which begins with a HEAD: one that was made already.

    Args:
        client: boto3's client.
        facts: What :func:`request_facts` has returned for the source.
    """

    def __init__(self, client: Any, facts: dict[str, Any]) -> None:
        self._client = client
        self._facts = facts

    def head_object(self, **_: Any) -> dict[str, Any]:
        """Return the facts, without a request."""
        return self._facts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)
