"""Result of a conversion, in either direction."""

from __future__ import annotations

import dataclasses

__all__ = ["Conversion"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        files: URIs or paths of the files that were written. The index, or ``.metadata``, comes last.
        nbytes: Bytes of the safetensors files that were written, headers included; or, of a conversion to DCP, of the
            tensors in them.
        tensors: Number of tensors.
        left_out: Names of the items that were left out because they are not tensors.
        checked_nbytes: Bytes of the source whose checksums were compared: none of safetensors files, which have no
            checksums, and none of a shard that is too large to be loaded at once.
        is_verified: True if all files were read back and compared with what was loaded.
    """

    files: tuple[str, ...]
    nbytes: int
    tensors: int
    left_out: tuple[str, ...]
    checked_nbytes: int
    is_verified: bool
