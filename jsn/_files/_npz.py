"""Station 10, .npz: a zip archive of numpy arrays.

In: an open file. Out: its entries, and what is wrong with the others. Arrays of Python objects,
which numpy would unpickle, are refused; no size is believed before it has been checked. An
archive that was cut off has lost the list at its end: then the members themselves are walked.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jsn._files._entry import (
    DTYPES,
    LARGEST_INDEX,
    Checkpoint,
    Entry,
    Unreadable,
    check_inflation,
    check_shape,
    fill,
    inflate,
    shaped,
    shorten,
)

_LONGEST_HEADER = 10_000


class _Member(NamedTuple):
    name: str
    at: int  # of its local header
    stored: int  # bytes in the archive
    size: int  # bytes when unpacked
    method: int
    checksum: int
    encrypted: bool


def index(file: BinaryIO, size: int, checkpoint: Checkpoint) -> None:
    """Adds the entries of a file of this size, and its problems.

    Raises:
        Unreadable: If it is no zip archive.
    """
    for member in _members(file, size, checkpoint):
        name = member.name.removesuffix(".npy")
        try:
            checkpoint.entries.append(_entry(name, member, file, size))
        except Unreadable as error:
            checkpoint.problems.append((name, str(error)))
        except Exception as error:  # numpy and zlib raise many kinds on hostile bytes
            checkpoint.problems.append((name, f"is corrupt: {shorten(str(error))}"))


def _members(file: BinaryIO, size: int, checkpoint: Checkpoint) -> list[_Member]:
    _check_list(file, size)
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # also ValueError, OverflowError, NotImplementedError, struct.error
        found = list(_walk(file, size))
        if not found:
            raise Unreadable(f"is no .npz file: {shorten(str(error))}") from None
        checkpoint.problems.append(("", "is cut off or corrupt: the list at its end is missing"))
        return found
    found = archive.infolist()
    return [
        _Member(
            *(x.filename, x.header_offset, x.compress_size, x.file_size, x.compress_type, x.CRC),
            encrypted=bool(x.flag_bits & 1),
        )
        for x in found
    ]


def _check_list(file: BinaryIO, size: int) -> None:
    """Refuses an archive whose list of members alone would fill the memory."""
    file.seek(max(0, size - 2**16 - 98))
    tail = file.read()
    end, zip64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    length = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if length == 2**32 - 1 and zip64 >= 0:
        length = int.from_bytes(tail[zip64 + 40 : zip64 + 48], "little")
    if LARGEST_INDEX < length <= size:
        raise Unreadable(f"has a list of members of {length} bytes: refused")


_LOCAL = struct.Struct("<4s5H3L2H")


def _local(file: BinaryIO, at: int) -> tuple[tuple, bytes, bytes, int] | None:
    """A local header: its fields, name and extra field, and where its data starts."""
    file.seek(at)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
        return None
    fields = _LOCAL.unpack(head)
    name, extra = file.read(fields[-2]), file.read(fields[-1])
    return fields, name, extra, at + _LOCAL.size + fields[-2] + fields[-1]


def _walk(file: BinaryIO, size: int) -> Iterator[_Member]:
    """The members of an archive without its list, from one local header to the next."""
    at = 0
    while at < size and (local := _local(file, at)) is not None:
        (_, _, flags, method, _, _, checksum, stored, unpacked, _, _), name, extra, start = local
        if flags & 8:  # sizes come after the data
            return
        while len(extra) >= 4:
            kind, length = struct.unpack("<HH", extra[:4])
            field, extra = extra[4 : 4 + length], extra[4 + length :]
            if kind == 1 and len(field) >= 16:  # zip64
                unpacked, stored = struct.unpack("<QQ", field[:16])
        text = name.decode("utf-8", "backslashreplace")
        yield _Member(text, at, stored, unpacked, method, checksum, bool(flags & 1))
        at = start + stored


def _entry(name: str, member: _Member, file: BinaryIO, size: int) -> Entry:
    local = _local(file, member.at)
    if local is None:
        raise Unreadable("is corrupt: no member where the archive says")
    start = local[-1]
    _check_packing(member)
    present = max(0, min(member.stored, size - start))
    head = np.empty(min(_LONGEST_HEADER + 12, member.size), np.uint8)
    if present < member.stored and present < len(head):
        raise Unreadable("is cut off")
    fill(head, _unpacked(file, member, start))
    shape, dtype, order, offset = _npy_header(head.tobytes())
    if math.prod(shape) * dtype.itemsize != member.size - offset:
        what = f"has {member.size - offset} bytes, not those of {dtype} in shape"
        raise Unreadable(f"{what} {shorten(str(shape))}")
    if present < member.stored:
        raise Unreadable(f"is cut off: the file ends {member.stored - present} bytes too early")

    def read() -> np.ndarray:
        flat = np.empty(member.size, np.uint8)
        try:
            fill(flat, _unpacked(file, member, start))
        except zlib.error as error:
            raise Unreadable(f"is corrupt: {error}") from None
        if zlib.crc32(flat) != member.checksum:  # type: ignore
            raise Unreadable("is corrupt: its checksum is wrong")
        return shaped(flat[offset:], shape, dtype, order)

    return Entry(name, shape, dtype, read)


def _check_packing(member: _Member) -> None:
    if member.encrypted:
        raise Unreadable("is encrypted")
    if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unreadable(f"is compressed by method {member.method}, which numpy does not write")
    if member.method == zipfile.ZIP_STORED and member.size != member.stored:
        raise Unreadable("is corrupt: it is not compressed, and yet changes its size")
    check_inflation(member.size, member.stored)


def _unpacked(file: BinaryIO, member: _Member, start: int) -> Callable[[int], bytes]:
    """A function that reads on in a member."""
    if member.method == zipfile.ZIP_DEFLATED:
        return inflate(file, start, member.stored)
    at = start

    def read(n: int) -> bytes:
        nonlocal at
        file.seek(at)
        part = file.read(min(n, start + member.stored - at))
        at += len(part)
        return part

    return read


def _npy_header(head: bytes) -> tuple[tuple[int, ...], np.dtype, str, int]:
    """Shape, dtype, order and length of the header of a .npy file."""
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        raise Unreadable("is no numpy array")
    version = head[6], head[7]
    if version not in ((1, 0), (2, 0)):
        raise Unreadable(f"is in version {version[0]}.{version[1]} of numpy's format: unknown")
    size = 2 if version == (1, 0) else 4
    offset = 8 + size + int.from_bytes(head[8 : 8 + size], "little")
    if offset > len(head):
        raise Unreadable("has a header that is cut off or absurdly long")
    stream = io.BytesIO(head[8:offset])
    parse = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse[version[0] - 1](stream)
    if dtype.hasobject:
        raise Unreadable("holds Python objects, which only pickle could read: refused")
    if dtype.newbyteorder("=") not in DTYPES.values():
        hint = " (numpy loses bfloat16 in .npz: save float32)" if dtype.kind == "V" else ""
        raise Unreadable(f"has the unknown dtype {shorten(str(dtype))}{hint}")
    return check_shape(shape, dtype), dtype, "F" if fortran else "C", offset
