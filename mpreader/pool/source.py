"""Sources: objects that a pool can read, as the pool sees them.

A source lives in the main process; only its routes are sent to the workers. Credentials never are.

The pool knows this protocol only; :mod:`mpreader.sources` has the classes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from mpreader.pool.worker.messages import FailureKind
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion

__all__ = ["LearningSource", "ObjectVersion", "Refusal", "Reroutable", "Source"]


class Refusal(NamedTuple):
    """A GET of a worker that the server refused, though the object is there: its version was found out before.

    Attributes:
        kind: DENIED, REDIRECTED, or REFUSED for another reason.
        detail: The server's answer, for people; holds no secret.
        code: S3's error code; "" if the answer had none.
    """

    kind: FailureKind
    detail: str
    code: str = ""


class Source(Protocol):
    """One object, opened lazily. Methods may block on the network and are called from threads of the pool."""

    @property
    def bucket(self) -> str:
        """Bucket, or host of an http(s) source; named in errors."""

    @property
    def key(self) -> str:
        """Key, or path of an http(s) source; named in errors."""

    @property
    def uri(self) -> str:
        """URI for people, ``s3://bucket/key`` or the URL without its secrets; errors begin with it."""

    @property
    def max_attempts(self) -> int:
        """Requests made for the same bytes before giving up."""

    @property
    def version(self) -> ObjectVersion | None:
        """The version to read, where that is decided already; None: the one that ``open`` finds."""

    def open(self) -> ObjectVersion:
        """Ask the server, once, which version there is now.

        Raises:
            TransportError: It could not be found out (ObjectMissing, AccessDenied, …).
        """

    def route(self) -> Route:
        """Make a fresh route, with fresh signature and credentials.

        Raises:
            TransportError: There are no credentials, or they could not be renewed.
        """


@runtime_checkable
class LearningSource(Protocol):
    """A source that outlives one read, and whose reads must all be of one version."""

    def learn(self, version: ObjectVersion) -> None:
        """Take over the validators that a read has found; called from a thread of the pool.

        Raises:
            ObjectChanged: Another read has found another version.
        """


@runtime_checkable
class Reroutable(Protocol):
    """A source that may know routes of several kinds, such as signatures in the query and in headers."""

    def other_route(self, refusal: Refusal) -> Route | None:
        """Make a route of another kind than the one that was refused; asked for once per read and kind of refusal.

        Returns:
            The route; None: there is no other one, and the refusal stands.

        Raises:
            TransportError: There is no other way; the error says why, with the server's reason.
        """
