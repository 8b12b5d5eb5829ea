"""CRC-32 function of the fastest library that is installed.

The decoders and the copier of tensors use it; no other module of theirs imports a library for CRCs. isal (installed by
the extra ``dcp``) computes 60 GB/s and zlib 7 GB/s, so that with isal the check of every tensor takes hardly any time.
"""

from __future__ import annotations

# "as crc32" marks the name as an export for type checkers. isal may be absent, or have types or not: hence the ignores.
try:
    from isal.isal_zlib import crc32 as crc32  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from zlib import crc32 as crc32

__all__ = ["crc32"]
