"""Station 10, Orbax: a directory with a list of its leaves and one tensorstore array for each.

In: a directory. Out: its entries, and what is wrong with the others. The arrays are opened with
tensorstore, which Orbax itself uses, one at a time; the metadata is plain JSON.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np

from jsn import _errors
from jsn._files._entry import (
    DTYPES,
    LARGEST_INDEX,
    MOST_ENTRIES,
    Checkpoint,
    Entry,
    Unreadable,
    check_inflation,
    check_shape,
    shorten,
)

_METADATA = "_METADATA"
_SECONDS = 600


def index(directory: pathlib.Path, checkpoint: Checkpoint) -> None:
    """Adds the entries of a directory, and its problems.

    Raises:
        Unreadable: If it is no checkpoint, or several.
        ImportError: If tensorstore is not installed.
    """
    directory = _locate(directory)
    leaves, ocdbt, zarr3 = _metadata(directory / _METADATA)
    try:
        import tensorstore
    except ImportError:
        what = "reading Orbax checkpoints"
        raise ImportError(_errors.missing_extra("jsn audit", "tensorstore", what)) from None
    stored = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    for keys in leaves:
        name = "/".join(keys)
        try:
            checkpoint.entries.append(_entry(tensorstore, directory, keys, ocdbt, zarr3, stored))
        except Unreadable as error:
            checkpoint.problems.append((name, str(error)))
        except Exception as error:  # tensorstore raises many kinds on hostile bytes
            checkpoint.problems.append((name, _short(error)))


def _locate(directory: pathlib.Path) -> pathlib.Path:
    """The directory that holds the list: this one, or the only one of its steps and items."""
    if (directory / _METADATA).is_file():
        return directory
    found = sorted(
        path.parent for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/{_METADATA}")
    )
    if len(found) == 1:
        return found[0]
    if found:
        names = [str(path.relative_to(directory)) for path in found]
        raise Unreadable(
            f"holds {len(found)} checkpoints, audit one of them: "
            f"{', '.join(shorten(name) for name in names[:8])}{', ...' if len(names) > 8 else ''}"
        )
    raise Unreadable(f"is a directory, and no Orbax checkpoint: it has no {_METADATA}")


def _metadata(path: pathlib.Path) -> tuple[list[tuple[str, ...]], bool, bool]:
    """The keys of all arrays, and how they are stored."""
    if path.stat().st_size > LARGEST_INDEX:
        raise Unreadable(f"has a {_METADATA} of more than {LARGEST_INDEX} bytes: refused")
    try:
        content: Any = json.loads(path.read_bytes())
        leaves = [
            tuple(str(key["key"]) for key in leaf["key_metadata"])
            for leaf in content["tree_metadata"].values()
            if leaf["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray")
            and not leaf["value_metadata"].get("skip_deserialize")
        ]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"has a corrupt {_METADATA}: {_short(error)}") from None
    if len(leaves) > MOST_ENTRIES:
        raise Unreadable(f"has more than {MOST_ENTRIES} entries: refused")
    return leaves, bool(content.get("use_ocdbt", True)), bool(content.get("use_zarr3"))


def _entry(
    ts: Any, directory: pathlib.Path, keys: tuple[str, ...], ocdbt: bool, zarr3: bool, stored: int
) -> Entry:
    name = ".".join(keys)
    if not ocdbt and (pathlib.PurePath(name).name != name or name in (".", "..")):
        raise Unreadable("has a name that leads out of the directory: refused")
    base = {"driver": "file", "path": f"{directory.resolve()}/"}
    store = (
        {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        if ocdbt
        else base | {"path": f"{directory.resolve()}/{name}/"}
    )
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}
    array = ts.open(spec, open=True, read=True).result(timeout=_SECONDS)
    dtype = DTYPES.get(np.dtype(array.dtype.numpy_dtype).name)
    if dtype is None:
        raise Unreadable(f"has the unknown dtype {shorten(str(array.dtype))}")
    shape = check_shape(tuple(array.shape), dtype)
    for sizes in (shape, array.chunk_layout.read_chunk.shape or ()):
        check_inflation(math.prod(int(n) for n in sizes) * dtype.itemsize, stored)

    def read() -> np.ndarray:
        try:
            return np.asarray(array.read().result(timeout=_SECONDS))
        except Exception as error:  # as above
            raise Unreadable(_short(error)) from None

    return Entry("/".join(keys), shape, dtype, read)


def _short(error: Exception) -> str:
    return f"cannot be read: {shorten(str(error) or type(error).__name__, 160)}"
