"""Decoder of ``torch.save`` records: finds the bytes of a record's tensor from the front of the record.

The storage reader uses it for every tensor, to copy the bytes from where they have arrived. A record is an uncompressed
zip archive, written as a stream::

    data.pkl | .format_version, .storage_alignment (torch 2.7+) | byteorder | data/0 | version | … | directory

Each entry is a local header, padding, the content, and a *data descriptor* with the content's CRC-32 and size.
The pickle says dtype, shape and strides; data/0 is the storage. The directory at the end is not needed, so a
record is decoded while its rest is still on the way.

Only what is fully understood is decoded. :func:`decode_layout` returns None for anything else, and
:func:`mpreader.dcp.tensor.load_whole` leaves it to ``torch.load``.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple, Protocol

from mpreader.dcp.crc import crc32
from mpreader.dcp.layout import TensorLayout, read_layout
from mpreader.errors import MpreaderError

__all__ = ["BufferItem", "ItemBytes", "RecordCorrupted", "decode_layout", "read_payload_crc"]


class RecordCorrupted(MpreaderError):
    """The bytes of a record contradict a checksum that is stored in it."""


class ItemBytes(Protocol):
    """Bytes of one stored item, wherever they lie; positions count from the item's first byte."""

    @property
    def size(self) -> int:
        """Bytes of the item."""

    def view(self, start: int, end: int) -> memoryview:
        """Returns the bytes ``[start, end)`` in one piece; a copy if they lie in several.

        The caller owns the view; it is valid until its last reference dies.
        """

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Yields the bytes ``[start, end)`` in order, without copying.

        Each piece is writable. The caller lets go of it before asking for the next one, which may need its memory.
        """


class BufferItem:
    """Item whose bytes lie in one writable buffer."""

    def __init__(self, data: bytearray | memoryview) -> None:
        self._data = memoryview(data)

    @property
    def size(self) -> int:
        """Bytes of the item."""
        return len(self._data)

    def view(self, start: int, end: int) -> memoryview:
        """Returns the bytes ``[start, end)``."""
        return self._data[start:end]

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Yields the bytes ``[start, end)`` as one piece."""
        yield self._data[start:end]


class _Header(NamedTuple):
    """Local header of an entry of the archive."""

    name: str
    content_start: int
    has_descriptor: bool
    crc32: int  # like the size, 0 if a descriptor follows the content
    size: int


class _Entry(NamedTuple):
    """Entry of the archive before the payload."""

    content: bytes
    crc32: int
    end: int  # position of the next entry


_LOCAL_HEADER: Final = Struct("<4s2xHH4xIIIHH")  # signature, flags, method, crc, stored, size, name, extra
_DESCRIPTOR: Final = Struct("<4sIII")
_DESCRIPTOR_64: Final = Struct("<4sIQQ")
_DESCRIPTOR_SIGNATURE: Final = b"PK\x07\x08"
_HAS_DESCRIPTOR: Final = 0x8
_UTF8_NAME: Final = 0x800
_IGNORED_ENTRIES: Final = frozenset({".storage_alignment", "version", ".data/serialization_id"})
_REQUIRED_CONTENT: Final = {"byteorder": b"little", ".format_version": b"1"}

# The payload of most records begins within the first; a storage alignment of 4 KiB needs the second.
_FRONT_SIZES: Final = (1024, 64 * 1024)
# Tensors of equal shape and dtype have equal fronts, so what was read of one is remembered. Threads may share it: the
# values don't change, and a front that is lost when all are dropped is only read again.
_MAX_KNOWN_FRONTS: Final = 4096
_known_fronts: dict[bytes, tuple[bytes, TensorLayout]] = {}


def decode_layout(item: ItemBytes) -> TensorLayout | None:
    """Find the tensor in a record; returns None if it is not a plain tensor as ``torch.save`` writes it.

    Reads the front of the record only. The payload lies within the item; it takes :func:`read_payload_crc` to know that
    its bytes are right.

    Raises:
        RecordCorrupted: The front of the record doesn't match its checksums.
    """
    for limit in _FRONT_SIZES:  # the longer front only if the payload does not begin in the shorter one
        front = bytes(item.view(0, min(limit, item.size)))
        layout = _known_layout(front) or _parse_front(front)
        if layout is not None:
            end = layout.payload_offset + layout.payload_nbytes
            return layout if end + _DESCRIPTOR.size <= item.size else None
        if limit >= item.size:
            break
    return None


def read_payload_crc(item: ItemBytes, layout: TensorLayout) -> int | None:
    """Returns the CRC-32 that was saved behind a payload that is not empty; None if the record has no checksums.

    Raises:
        RecordCorrupted: The payload is not followed by its data descriptor.
    """
    end = layout.payload_offset + layout.payload_nbytes
    tail = item.view(end, min(end + _DESCRIPTOR_64.size, item.size))
    signature, crc, *sizes = _DESCRIPTOR.unpack_from(tail)
    if sizes != [layout.payload_nbytes] * 2 and len(tail) == _DESCRIPTOR_64.size:
        signature, crc, *sizes = _DESCRIPTOR_64.unpack(tail)  # used from 4 GiB on
    if signature != _DESCRIPTOR_SIGNATURE or sizes != [layout.payload_nbytes] * 2:
        raise RecordCorrupted("a tensor's bytes are not followed by their size in a torch.save record")
    if crc and not layout.has_crc:
        raise RecordCorrupted("data.pkl of a torch.save record has lost its CRC-32")
    return crc if layout.has_crc else None


def _known_layout(front: bytes) -> TensorLayout | None:
    # A front that is equal up to the payload has the same data.pkl, which was checked when it was read first.
    prefix, layout = _known_fronts.get(_front_key(front), (b"", None))
    return layout if front.startswith(prefix) else None


def _front_key(front: bytes) -> bytes:
    """Returns the bytes up to the end of data.pkl, the first entry."""
    return front[: front.find(_DESCRIPTOR_SIGNATURE)]


def _parse_front(front: bytes) -> TensorLayout | None:
    """Read the entries before the payload; returns None if there is one that is not understood, or not all of it."""
    entries: dict[str, _Entry] = {}
    position = 0
    while (header := _read_header(front, position)) is not None and not header.name.startswith("data/"):
        entry = _read_entry(front, header)
        if entry is None or header.name in entries:
            return None
        entries[header.name] = entry
        position = entry.end
    if header is None:
        return None
    # torch.save without checksums writes 0 for all; with them, a CRC of 0 is a matter of chance for a single entry.
    has_crc = any(entry.crc32 for entry in entries.values())
    if has_crc:
        _check(entries)
    if not _is_understood(entries):
        return None
    layout = read_layout(entries["data.pkl"].content, header.name, header.content_start, has_crc=has_crc)
    # An empty payload is written without a descriptor.
    if layout is None or not (header.has_descriptor or header.size == layout.payload_nbytes == 0):
        return None
    if len(_known_fronts) >= _MAX_KNOWN_FRONTS:
        _known_fronts.clear()
    _known_fronts[_front_key(front)] = (front[: header.content_start], layout)
    return layout


def _read_header(front: bytes, position: int) -> _Header | None:
    if position + _LOCAL_HEADER.size > len(front):
        return None
    fields = _LOCAL_HEADER.unpack_from(front, position)
    signature, flags, method, crc, stored, size, name_length, extra_length = fields
    name_start = position + _LOCAL_HEADER.size
    content_start = name_start + name_length + extra_length
    # An entry that is neither compressed nor encrypted, and has no flag that would change how it is read.
    understood = signature == b"PK\x03\x04" and not method and not flags & ~(_HAS_DESCRIPTOR | _UTF8_NAME)
    if not understood or stored != size or content_start > len(front):
        return None
    full_name = front[name_start : name_start + name_length].decode("utf-8", "replace")
    # The first part is the archive's own name: "archive", or the name of the file it was saved to.
    return _Header(full_name.partition("/")[2], content_start, bool(flags & _HAS_DESCRIPTOR), crc, size)


def _read_entry(front: bytes, header: _Header) -> _Entry | None:
    start = header.content_start
    if not header.has_descriptor:
        end = start + header.size
        return _Entry(front[start:end], header.crc32, end) if end <= len(front) else None
    # The size stands behind the content only. A signature within the content is recognised by the wrong size behind it.
    end = front.find(_DESCRIPTOR_SIGNATURE, start)
    while 0 <= end <= len(front) - _DESCRIPTOR.size:
        _, crc, stored, size = _DESCRIPTOR.unpack_from(front, end)
        if stored == size == end - start:
            return _Entry(front[start:end], crc, end + _DESCRIPTOR.size)
        end = front.find(_DESCRIPTOR_SIGNATURE, end + 1)
    return None


def _check(entries: dict[str, _Entry]) -> None:
    for name, entry in entries.items():
        if crc32(entry.content) != entry.crc32:
            raise RecordCorrupted(f"{name} of a torch.save record doesn't match its CRC-32")


def _is_understood(entries: dict[str, _Entry]) -> bool:
    # An entry that is not known may change the meaning of the others: such a record is left to torch.load.
    if not {"data.pkl", "byteorder"} <= entries.keys():
        return False
    if not entries.keys() <= {"data.pkl", *_REQUIRED_CONTENT, *_IGNORED_ENTRIES}:
        return False
    return all(entries[name].content == content for name, content in _REQUIRED_CONTENT.items() if name in entries)
