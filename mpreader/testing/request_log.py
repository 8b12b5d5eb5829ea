"""Request log of the embedded S3: its entries, and the path under which the server's process hands them out.

Both :mod:`mpreader.testing.s3_server`, in the process of the tests, and :mod:`mpreader.testing.s3_process`, in that of
the server, import it. It imports nothing itself, since the former must work without moto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["LOG_PATH", "S3Request"]

LOG_PATH: Final = "/_requests"  # no bucket can have this name


@dataclass(frozen=True, slots=True)
class S3Request:
    """One request that the server got.

    Attributes:
        method: ``"GET"``, ``"HEAD"``, …
        path: Percent-decoded path without the query: ``/bucket/key``.
        range: The Range header; None if there was none.
        status: Status of the response.
    """

    method: str
    path: str
    range: str | None
    status: int
