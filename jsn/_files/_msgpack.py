"""Station 10, msgpack as Flax writes it: nested maps whose leaves are arrays.

In: an open file. Out: its entries, and what is wrong with the others. The file is walked without
loading it: only keys and the few bytes before each array are read, and each length is compared
with what is left of the file before it is believed.

    array = ext 1, number = ext 3: [shape, dtype, bytes]
    array above 2^30 bytes = {"__msgpack_chunked_array__": true, "shape": {..}, "chunks": {..}}

References:
    https://github.com/msgpack/msgpack/blob/master/spec.md, flax/serialization.py.
"""

from __future__ import annotations

import math
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jsn._files._entry import (
    DTYPES,
    MOST_ENTRIES,
    Checkpoint,
    Entry,
    Unreadable,
    array_at,
    check_shape,
    fill,
    shaped,
    shorten,
)

_DEEPEST = 64
_LONGEST_KEY = 2**10
_LONGEST_NAMES = 2**26
"""Of all names together: nested maps repeat the keys above them in each."""
_CHUNKED = "__msgpack_chunked_array__"


def index(file: BinaryIO, size: int, checkpoint: Checkpoint) -> None:
    """Adds the entries of a file of this size, and its problems.

    Raises:
        Unreadable: If it is no map of arrays.
    """
    walk = _Walk(file, size, checkpoint)
    try:
        kind, length = walk.token()
        if kind != "map":
            raise Unreadable(f"is no Flax checkpoint: it starts with a {kind}, not with a map")
        walk.map((), length)
    except Unreadable as error:
        if not checkpoint.entries:
            raise
        checkpoint.problems.append((walk.last, str(error)))
        return
    if walk.at != size:
        checkpoint.problems.append(("", f"{size - walk.at} bytes follow after its end"))


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


_SIMPLE = {0xC0: ("nil", 0), 0xC2: ("bool", 0), 0xC3: ("bool", 0), 0xCA: ("float", 4)}
_SIMPLE |= {0xCB: ("float", 8)}
_SIMPLE |= {0xCC + i: ("int", 2**i) for i in range(4)} | {0xD0 + i: ("int", 2**i) for i in range(4)}
_SIZED = {0xC4 + i: ("bin", 2**i) for i in range(3)} | {0xC7 + i: ("ext", 2**i) for i in range(3)}
_SIZED |= {0xD9 + i: ("str", 2**i) for i in range(3)}
_SIZED |= {0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}


class _Walk:
    """One pass over a file, from token to token."""

    def __init__(self, file: BinaryIO, size: int, checkpoint: Checkpoint):
        self.file, self.size, self.checkpoint = file, size, checkpoint
        self.at, self.last, self.values, self.named = 0, "", 0, 0

    def take(self, n: int) -> bytes:
        self.skip(n)
        self.file.seek(self.at - n)
        return self.file.read(n)

    def skip(self, n: int) -> None:
        if n > self.size - self.at:
            raise Unreadable("is cut off or corrupt: the file ends in the middle")
        self.at += n

    def token(self) -> tuple[str, int]:
        """What comes next, and its length; the bytes of scalars are skipped."""
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return "int", 0
        if code < 0xC0:
            kind = "map" if code < 0x90 else "list" if code < 0xA0 else "str"
            return kind, code & (0x1F if kind == "str" else 0x0F)
        if code in _SIMPLE:
            kind, length = _SIMPLE[code]
            self.skip(length)
            return kind, 0
        if 0xD4 <= code <= 0xD8:
            return "ext", 2 ** (code - 0xD4)
        if code not in _SIZED:
            raise Unreadable(f"is corrupt: byte {code:#x} means nothing in msgpack")
        kind, width = _SIZED[code]
        return kind, int.from_bytes(self.take(width), "big")

    def map(self, path: tuple[str, ...], length: int) -> None:
        """Walks a map."""
        for i in range(length):
            key = self.key()
            if key == _CHUNKED and i == 0:
                self.chunked(path, length)
                return
            self.value((*path, key))

    def key(self) -> str:
        start = self.at
        kind, length = self.token()
        if kind == "int":
            self.at = start
            return str(self.integer())
        if kind != "str" or length > _LONGEST_KEY:
            raise Unreadable(f"is corrupt: a {kind} of length {length} stands for a key")
        return self.take(length).decode("utf-8", "backslashreplace")

    def value(self, path: tuple[str, ...]) -> None:
        """Walks one value; arrays become entries, scalars are left out."""
        self.values += 1
        if len(path) > _DEEPEST or self.values > MOST_ENTRIES:
            raise Unreadable(f"is nested deeper than {_DEEPEST} or has over {MOST_ENTRIES} values")
        self.last = "/".join(path)
        self.named += len(self.last)
        if self.named > _LONGEST_NAMES:
            raise Unreadable(f"has names of over {_LONGEST_NAMES} characters: refused")
        kind, length = self.token()
        if kind == "map":
            self.map(path, length)
        elif kind == "list":
            for i in range(length):
                self.value((*path, str(i)))
        elif kind == "ext":
            self.extension(path, length)
        else:
            self.skip(length)

    def extension(self, path: tuple[str, ...], length: int) -> None:
        code, end = self.take(1)[0], self.at + length
        if end > self.size:
            raise Unreadable(f"is cut off: the file ends {end - self.size} bytes too early")
        if code in (1, 3):  # Flax's arrays and numpy scalars; 2 is a complex number
            name = "/".join(path)
            try:
                x = self.array(end)
                read = lambda: array_at(self.file, x.start, x.shape, x.dtype)
                self.checkpoint.entries.append(Entry(name, x.shape, x.dtype, read))
            except Unreadable as error:
                self.checkpoint.problems.append((name, str(error)))
        self.at = end

    def array(self, end: int) -> _Array:
        """The head of an array: `[shape, dtype, bytes]`."""
        if self.token() != ("list", 3):
            raise Unreadable("is corrupt: no [shape, dtype, bytes]")
        shape = self.sizes()
        kind, length = self.token()
        text = self.take(length).decode("utf-8", "replace") if kind == "str" else kind
        dtype = DTYPES.get(text)
        if dtype is None:
            raise Unreadable(f"has the unknown dtype {shorten(text)}")
        kind, length = self.token()
        if kind != "bin" or self.at + length != end:
            raise Unreadable("is corrupt: its bytes are not where they should be")
        shape = check_shape(shape, dtype)
        if math.prod(shape) * dtype.itemsize != length:
            what = f"has {length} bytes, not those of {dtype} in shape {shorten(str(shape))}"
            raise Unreadable(what)
        return _Array(shape, dtype, self.at)

    def sizes(self) -> list[int]:
        kind, length = self.token()
        if kind != "list" or length > 64:
            raise Unreadable("is corrupt: its shape is no list")
        return [self.integer() for _ in range(length)]

    def integer(self) -> int:
        start = self.at
        if self.token()[0] != "int":
            raise Unreadable("is corrupt: a size is no integer")
        after = self.at
        self.at = start
        code, *rest = self.take(after - start)
        if not rest:
            return code if code < 0x80 else code - 256
        return int.from_bytes(bytes(rest), "big", signed=code >= 0xD0)

    def chunked(self, path: tuple[str, ...], length: int) -> None:
        """An array in pieces: `true, "shape", {"0": n, ..}, "chunks", {"0": array, ..}`."""
        name = "/".join(path)
        shape = pieces = None
        self.token()
        for _ in range(length - 1):
            key, (kind, count) = self.key(), self.token()
            if kind != "map" or key not in ("shape", "chunks"):
                raise Unreadable("is corrupt: no array in chunks")
            if key == "shape":
                shape = [(self.key(), self.integer())[1] for _ in range(min(count, 64))]
            else:
                pieces = [self.chunk() for _ in range(count)]
        if shape is None or not pieces:
            raise Unreadable("is corrupt: an array in chunks lacks its shape or chunks")
        dtype = pieces[0].dtype
        shape = check_shape(shape, dtype)
        sizes = [math.prod(piece.shape) for piece in pieces]
        if sum(sizes) != math.prod(shape) or any(piece.dtype != dtype for piece in pieces):
            raise Unreadable("is corrupt: its chunks do not add up to its shape")

        def read() -> np.ndarray:
            flat, done = np.empty(sum(sizes) * dtype.itemsize, np.uint8), 0
            for piece, n in zip(pieces, sizes, strict=True):
                self.file.seek(piece.start)
                fill(flat[done : done + n * dtype.itemsize], self.file.read)
                done += n * dtype.itemsize
            return shaped(flat, shape, dtype, "C")

        self.checkpoint.entries.append(Entry(name, shape, dtype, read))

    def chunk(self) -> _Array:
        self.key()
        kind, length = self.token()
        if kind != "ext" or self.take(1) != b"\x01" or length > self.size - self.at:
            raise Unreadable("is cut off or corrupt: a chunk is no array")
        end = self.at + length
        piece: Any = self.array(end)
        self.at = end
        return piece
