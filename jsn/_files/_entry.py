"""Station 10, what every reader of a checkpoint file hands out: entries, and what is wrong.

In: what a file says about its arrays. Out: `Entry`, an array that is read when asked for;
`Checkpoint`, all entries of a file. Must not know any format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import BinaryIO

import ml_dtypes
import numpy as np

from jsn._errors import Problem


class Unreadable(ValueError):
    """A file, or an entry of one, that cannot be read; the message says why in one line."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a file: what the file says about it, and how to read it.

    Attributes:
        name: As in the file; nested keys are joined by "/".
        shape: The shape that the file declares, checked against the bytes that are there.
        dtype: The dtype.
        read: Reads the array; raises Unreadable.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass
class Checkpoint:
    """A file of arrays: use it in a with statement, which closes the file.

    Attributes:
        kind: The name of the format.
        entries: What can be read, in the order of the file.
        problems: What cannot: the name of an entry, or "" for the file, and why.
    """

    kind: str
    entries: list[Entry] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    files: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.close()


MOST_ENTRIES = 1_000_000
"""More entries than any checkpoint has."""
LARGEST_INDEX = 16 * 2**20
"""Bytes of a header or list of arrays: far above any real one (100 bytes an array), far below
what would fill the memory."""
_BOMB = 64 * 2**20
_RATIO = 100

DTYPES: dict[str, np.dtype] = {
    np.dtype(x).name: np.dtype(x)
    for x in (
        *(np.float64, np.float32, np.float16, np.complex64, np.complex128, np.bool_),
        *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
        *(ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e4m3b11fnuz),
    )
}
"""The dtypes that are read, by numpy's names for them."""


def check_shape(shape: object, dtype: np.dtype) -> tuple[int, ...]:
    """A shape as a tuple.

    Raises:
        Unreadable: If it is no sequence of sizes that numpy could hold.
    """
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise Unreadable(f"shape {shorten(str(shape))} is no list of sizes")
    sizes: tuple[int, ...] = tuple(shape)
    if len(sizes) > 32 or math.prod(n for n in sizes if n) * dtype.itemsize >= 2**62:
        raise Unreadable(f"shape {shorten(str(shape))} is beyond any array")
    return sizes


def check_inflation(needed: int, stored: int) -> None:
    """Refuses compressed data that unpacks to out of all proportion.

    Raises:
        Unreadable: If so: weights hardly compress at all.
    """
    if needed > _BOMB and needed > _RATIO * stored:
        raise Unreadable(
            f"{stored} bytes claim to unpack to {needed}, over {_RATIO} times as many: refused"
        )


def array_at(
    file: BinaryIO, start: int, shape: tuple[int, ...], dtype: np.dtype, order: str = "C"
) -> np.ndarray:
    """Reads an array that lies in a file as it lies in memory: no second copy is made.

    Raises:
        Unreadable: If the file ends early.
    """
    flat = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    file.seek(start)
    fill(flat, file.read)
    return shaped(flat, shape, dtype, order)


def fill(flat: np.ndarray, read: Callable[[int], bytes]) -> None:
    """Fills a buffer, some megabytes at a time.

    Raises:
        Unreadable: If there is too little to read.
    """
    done = 0
    while done < len(flat):
        part = read(min(len(flat) - done, 2**22))
        if not part:
            raise Unreadable(f"its data ends after {done} of {len(flat)} bytes")
        flat[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)


def shaped(flat: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, order: str) -> np.ndarray:
    """Bytes as an array of the machine's own byte order."""
    array = flat.view(dtype).reshape(shape, order=order)  # type: ignore
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def inflate(file: BinaryIO, start: int, stored: int) -> Callable[[int], bytes]:
    """A function that reads on in a raw deflate stream."""
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    at = start

    def read(n: int) -> bytes:
        nonlocal at
        while not unpack.eof:
            rest = unpack.unconsumed_tail
            if not rest:
                file.seek(at)
                rest = file.read(min(2**20, start + stored - at))
                at += len(rest)
            part = unpack.decompress(rest, n)
            if part or not rest:
                return part
        return b""

    return read


def shorten(text: str, most: int = 80) -> str:
    """A text from a file, safe to print: no control characters, and not too long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 4 * most])
    return text if len(text) <= most else f"{text[: most - 24]}...{text[-20:]}"
