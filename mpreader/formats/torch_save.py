"""Decoder of ``torch.save`` records: finds the bytes of a record's tensor from the first bytes of the record.

The loader of items calls it for every tensor, and the copier (:mod:`mpreader.dcp.tensor`) reads the saved CRC with it.
It must not need more than the front of the record (all that comes before the tensor's bytes), so that the copy can
begin while the rest of the record is still being received. A record is an uncompressed zip archive, written as a
stream::

    data.pkl | .format_version, .storage_alignment (torch 2.7+) | byteorder | data/0 | version | … | directory
    └───────────────────────────── the front ─────────────────────────────┘   └ the payload: the tensor's storage

Each entry consists of a local header, padding, the content, and a *data descriptor* with the CRC-32 and the size of the
content. ``data.pkl`` is the pickle with dtype, shape and strides. The directory at the end of the archive isn't needed.

Its length tells nearly where the payload begins, before any byte of the record is read (:func:`payload_place`).

A record that has anything unknown in it is not decoded: :func:`decode_layout` returns None, and
:func:`mpreader.dcp.tensor.load_whole` reads the record by ``torch.load``.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple, Protocol

from mpreader.errors import MpreaderError
from mpreader.formats.crc import crc32
from mpreader.formats.layout import TensorLayout
from mpreader.formats.torch_pickle import read_layout

__all__ = ["BufferItem", "ItemBytes", "RecordCorrupted", "decode_layout", "payload_place", "read_payload_crc"]


class RecordCorrupted(MpreaderError):
    """The bytes of a record contradict a checksum that is stored in it."""


class ItemBytes(Protocol):
    """Bytes of one stored item, in one or several pieces of memory; positions count from the item's first byte."""

    @property
    def size(self) -> int:
        """Bytes of the item."""

    def view(self, start: int, end: int) -> memoryview:
        """Returns the bytes ``[start, end)`` in one piece; they are copied if they lie in several.

        The caller owns the view; it is valid until its last reference is gone.
        """

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Yields the bytes ``[start, end)`` in order, without copying.

        Each piece is writable. The caller must drop all references to it before it asks for the next piece, which may
        be received into the same memory.
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
    """Local header of an entry of the archive.

    Attributes:
        name: Name of the entry, without the name of the archive.
        content_start: Position of the content's first byte.
        has_descriptor: True if a data descriptor follows the content.
        crc32: CRC-32 of the content; 0 if it stands in the data descriptor.
        size: Bytes of the content; 0 if they stand in the data descriptor.
    """

    name: str
    content_start: int
    has_descriptor: bool
    crc32: int
    size: int


class _Entry(NamedTuple):
    """Entry of the archive before the payload.

    Attributes:
        content: The content.
        crc32: CRC-32 of the content, as it was saved.
        end: Position of the next entry.
    """

    content: bytes
    crc32: int
    end: int


# Fields: signature, flags, compression method, CRC-32, stored size, size, length of the name, length of the padding.
_LOCAL_HEADER: Final = Struct("<4s2xHH4xIIIHH")
# Fields: signature, CRC-32, stored size, size. The second form is that of entries from 4 GiB on.
_DESCRIPTOR: Final = Struct("<4sIII")
_DESCRIPTOR_64: Final = Struct("<4sIQQ")
# Fields: identification, size. The padding is such a field, and the last one.
_EXTRA_FIELD: Final = Struct("<2sH")
_DESCRIPTOR_SIGNATURE: Final = b"PK\x07\x08"
# Flags of a local header.
_HAS_DESCRIPTOR: Final = 0x8
_UTF8_NAME: Final = 0x800
# Known entries whose content does not change the meaning of the payload.
_IGNORED_ENTRIES: Final = frozenset({".storage_alignment", "version", ".data/serialization_id"})
# Known entries that would change it: with any other content, the record is left to torch.load.
_REQUIRED_CONTENT: Final = {"byteorder": b"little", ".format_version": b"1"}

# Bytes of all that follows the payload. torch 2.2 to 2.14 write 668 to 873 bytes, depending on their version and on the
# payload's length (the next entry is aligned), and up to 60 more behind a payload of 4 GiB or more.
_TAIL_NBYTES: Final = (640, 1024)
# With another alignment of storages than torch's default of 64 bytes, those two entries that follow the payload are
# aligned so, too, and the five before it take five times the alignment. Such records have more around the payload than
# any other.
_LEAST_AROUND_NBYTES: Final = 2048
_ALIGNED_ENTRIES: Final = 6  # at least so many alignments are around the payload, and less than twice as many

# The payload of most records begins within the first 1024 bytes; a storage alignment of 4 KiB needs the longer front.
_FRONT_SIZES: Final = (1024, 64 * 1024)
# Cache of layouts: tensors of equal shape and dtype have equal fronts, and reading a front takes longer than comparing
# it. Threads may share it without a lock: a value never changes, and an entry that another thread drops is only read
# again.
_MAX_KNOWN_FRONTS: Final = 4096
# By _front_key: all bytes before the payload, and the layout.
_known_fronts: dict[bytes, tuple[bytes, TensorLayout]] = {}


def payload_place(record_nbytes: int, payload_nbytes: int) -> tuple[int, int] | None:
    """Returns the lowest and the highest place where the payload of a record may begin, if it is one of ``torch.save``.

    The record need not have been read: torch writes as much around a payload as its version, the shape and an
    alignment of the payload require, of which the part behind the payload hardly varies.

    Args:
        record_nbytes: Bytes of the record.
        payload_nbytes: Bytes of the payload.

    Returns:
        The two places; None if a record of this length can't hold the payload, or is longer than any that
        :func:`decode_layout` understands.
    """
    around = record_nbytes - payload_nbytes
    lowest, highest = (around - nbytes for nbytes in reversed(_tail_nbytes(around)))
    if highest < _LOCAL_HEADER.size or lowest > _FRONT_SIZES[-1]:
        return None
    return max(0, lowest), highest


def _tail_nbytes(around: int) -> tuple[int, int]:
    """Returns the least and the greatest number of bytes behind the payload of a record that has ``around`` besides."""
    least, greatest = _TAIL_NBYTES
    if around < _LEAST_AROUND_NBYTES:
        return least, greatest
    alignment = 1 << ((around // _ALIGNED_ENTRIES).bit_length() - 1)
    return least + alignment - 128, greatest + 2 * alignment


def decode_layout(item: ItemBytes, front_nbytes: int | None = None) -> TensorLayout | None:
    """Find the tensor in a record; returns None if it is not a plain tensor as ``torch.save`` writes it.

    Reads and checks the front of the record only. The payload of a layout that is returned lies within the item, but
    its bytes are unchecked: compare their CRC with that of :func:`read_payload_crc`.

    Args:
        item: The record.
        front_nbytes: Number of bytes at its start that may be read; None is also returned if the payload does not
            begin within them. None: as many as are needed.

    Raises:
        RecordCorrupted: The front of the record doesn't match its checksums.
    """
    # The longer front is read only if the payload does not begin in the shorter one.
    for limit in _FRONT_SIZES if front_nbytes is None else (front_nbytes,):
        # A copy, so that the view ends here: it may be of a slot of shared memory.
        front = bytes(item.view(0, min(limit, item.size)))
        layout = _known_layout(front) or _parse_front(front)
        if layout is not None:
            # Descriptor or, behind an empty payload, directory: at least so many bytes follow in a whole record.
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
        signature, crc, *sizes = _DESCRIPTOR_64.unpack(tail)
    if signature != _DESCRIPTOR_SIGNATURE or sizes != [layout.payload_nbytes] * 2:
        raise RecordCorrupted("a tensor's bytes are not followed by their size in a torch.save record")
    # A record has checksums for all of its entries or for none. If only those of the front are 0, the front is damaged.
    if crc and not layout.has_crc:
        raise RecordCorrupted("data.pkl of a torch.save record has lost its CRC-32")
    return crc if layout.has_crc else None


def _known_layout(front: bytes) -> TensorLayout | None:
    # A front that is equal up to the payload has the same layout, and was checked when it was first read. All bytes are
    # compared, not only those of the key: a flipped bit behind data.pkl must be noticed, too.
    prefix, layout = _known_fronts.get(_front_key(front), (b"", None))
    return layout if front.startswith(prefix) else None


def _front_key(front: bytes) -> bytes:
    """Returns the bytes up to the end of the content of data.pkl, the first entry."""
    return front[: front.find(_DESCRIPTOR_SIGNATURE)]


def _parse_front(front: bytes) -> TensorLayout | None:
    """Read the layout from the entries before the payload.

    Args:
        front: The first bytes of the record.

    Returns:
        The layout; None if ``front`` ends before the payload begins, or has an entry that is not understood.

    Raises:
        RecordCorrupted: The content of an entry doesn't match its CRC.
    """
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
    # Without checksums torch.save writes a CRC of 0 for every entry. With checksums a single CRC may be 0 by chance, so
    # all of them are looked at.
    has_crc = any(entry.crc32 for entry in entries.values())
    if has_crc:
        _check_crcs(entries)  # first of all: what a flipped bit has made unknown is damage, and not for torch.load
    if not _is_understood(entries):
        return None
    layout = read_layout(entries["data.pkl"].content, header.name, header.content_start, has_crc=has_crc)
    # The CRC of a payload stands in its descriptor; only an empty payload is written without one.
    if layout is None or not (header.has_descriptor or header.size == layout.payload_nbytes == 0):
        return None
    # Longer ones are not torch's own; thousands of them, kept as long as the process lives, would be much memory.
    if header.content_start <= _FRONT_SIZES[0]:
        if len(_known_fronts) >= _MAX_KNOWN_FRONTS:
            _known_fronts.clear()  # rare, and cheaper than to keep the order of their use
        _known_fronts[_front_key(front)] = (front[: header.content_start], layout)
    return layout


def _read_header(front: bytes, position: int) -> _Header | None:
    """Read a local header; returns None if ``front`` ends before the content, or the header is not understood."""
    if position + _LOCAL_HEADER.size > len(front):
        return None
    fields = _LOCAL_HEADER.unpack_from(front, position)
    signature, flags, method, crc, stored, size, name_length, extra_length = fields
    name_start = position + _LOCAL_HEADER.size
    content_start = name_start + name_length + extra_length
    # A compression method of 0 says "not compressed". Other flags than these two (one of them says "encrypted") would
    # change the way in which the entry is read.
    understood = signature == b"PK\x03\x04" and not method and not flags & ~(_HAS_DESCRIPTOR | _UTF8_NAME)
    if not understood or stored != size or content_start > len(front):
        return None
    if not _is_padding(front[content_start - extra_length : content_start]):
        return None
    full_name = front[name_start : name_start + name_length].decode("utf-8", "replace")
    # The first part of the path is the archive's own name: "archive", or the name of the file that it was saved to.
    return _Header(full_name.partition("/")[2], content_start, bool(flags & _HAS_DESCRIPTOR), crc, size)


def _is_padding(extra: bytes) -> bool:
    """Returns True if the extra fields of a local header end in the padding that torch writes.

    No CRC covers a header. A flipped bit in the length of the fields would move the content, and of a box of a tensor
    the CRC of the content is not compared. So the bytes of the padding tell if the length is right.
    """
    position = 0
    while position + _EXTRA_FIELD.size <= len(extra):
        size: int
        name, size = _EXTRA_FIELD.unpack_from(extra, position)
        position += _EXTRA_FIELD.size
        if name == b"FB":
            return extra[position:] == b"Z" * size
        position += size
    return False


def _read_entry(front: bytes, header: _Header) -> _Entry | None:
    """Read the entry of a header; returns None if ``front`` ends before the entry does."""
    start = header.content_start
    if not header.has_descriptor:
        end = start + header.size
        return _Entry(front[start:end], header.crc32, end) if end <= len(front) else None
    # The end is found by the descriptor, since the size stands only there. The content may have the bytes of the
    # signature in it, too: then the size behind them does not fit, and the search goes on.
    end = front.find(_DESCRIPTOR_SIGNATURE, start)
    while 0 <= end <= len(front) - _DESCRIPTOR.size:
        _, crc, stored, size = _DESCRIPTOR.unpack_from(front, end)
        if stored == size == end - start:
            return _Entry(front[start:end], crc, end + _DESCRIPTOR.size)
        end = front.find(_DESCRIPTOR_SIGNATURE, end + 1)
    return None


def _check_crcs(entries: dict[str, _Entry]) -> None:
    for name, entry in entries.items():
        if crc32(entry.content) != entry.crc32:
            raise RecordCorrupted(f"{name} of a torch.save record doesn't match its CRC-32")


def _is_understood(entries: dict[str, _Entry]) -> bool:
    # An unknown entry may change the meaning of the others, so a record with one is left to torch.load.
    if not {"data.pkl", "byteorder"} <= entries.keys():
        return False
    if not entries.keys() <= {"data.pkl", *_REQUIRED_CONTENT, *_IGNORED_ENTRIES}:
        return False
    return all(entries[name].content == content for name, content in _REQUIRED_CONTENT.items() if name in entries)
