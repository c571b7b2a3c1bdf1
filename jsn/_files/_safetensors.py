"""Station 10, safetensors: a length, a JSON header, and the bytes of all arrays.

In: an open file. Out: its entries, and what is wrong with the others. The header is read here and
not by the safetensors library, which refuses a truncated file as a whole and knows no float8 in
numpy; that both accept the same files is tested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from jsn._files._entry import (
    DTYPES,
    LARGEST_INDEX,
    Checkpoint,
    Entry,
    Unreadable,
    array_at,
    check_shape,
    shorten,
)

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def index(file: BinaryIO, size: int, checkpoint: Checkpoint) -> None:
    """Adds the entries of a file of this size, and its problems.

    Raises:
        Unreadable: If the header itself cannot be read.
    """
    header, start = _header(file, size)
    end, reached = size - start, 0
    for name, info, (begin, stop) in _in_order(header, checkpoint):
        if begin < reached:
            checkpoint.problems.append((name, "overlaps the tensor before it"))
            continue
        if begin > reached:
            checkpoint.problems.append((name, f"lies after {begin - reached} unused bytes"))
        reached = stop
        try:
            shape, dtype = _declared(info, stop - begin)
            if stop > end:
                raise Unreadable(f"is cut off: the file ends {stop - end} bytes too early")
        except Unreadable as error:
            checkpoint.problems.append((name, str(error)))
            continue

        def read(begin=begin, shape=shape, dtype=dtype) -> np.ndarray:
            return array_at(file, start + begin, shape, dtype)

        checkpoint.entries.append(Entry(name, shape, dtype, read))
    if reached < end:
        checkpoint.problems.append(("", f"{end - reached} bytes at the end belong to no tensor"))


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise Unreadable(f"is no safetensors file: it has {size} bytes, and the header takes 8")
    if length > size - 8:
        raise Unreadable(f"is cut off or no safetensors file: the header claims {length} bytes")
    if length > LARGEST_INDEX:
        raise Unreadable(f"has a header of {length} bytes, more than {LARGEST_INDEX}: refused")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        detail = shorten(str(error)) if isinstance(error, Unreadable) else "no JSON"
        raise Unreadable(f"has a corrupt header: {detail}") from None
    if not isinstance(header, dict):
        raise Unreadable("has a corrupt header: no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unreadable("a name stands in it twice")
    return found


def _in_order(
    header: dict[str, Any], checkpoint: Checkpoint
) -> Iterator[tuple[str, dict[str, Any], tuple[int, int]]]:
    """Tensors by where they lie; those that do not say so are problems."""
    found = []
    for name, info in header.items():
        at = info.get("data_offsets") if isinstance(info, dict) else None
        if (
            not isinstance(at, list)
            or len(at) != 2
            or not all(type(x) is int for x in at)
            or not 0 <= at[0] <= at[1]
        ):
            what = f"has the offsets {shorten(str(at))}" if at is not None else "has no offsets"
            checkpoint.problems.append((name, what))
        else:
            found.append((name, info, (at[0], at[1])))
    yield from sorted(found, key=lambda entry: entry[2])


def _declared(info: dict[str, Any], nbytes: int) -> tuple[tuple[int, ...], np.dtype]:
    dtype = DTYPES.get(_NAMES.get(str(info.get("dtype")), ""))
    if dtype is None:
        raise Unreadable(f"has the unknown dtype {shorten(str(info.get('dtype')))}")
    shape = check_shape(info.get("shape"), dtype)
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise Unreadable(f"has {nbytes} bytes, not those of {dtype} in shape {shorten(str(shape))}")
    return shape, dtype
