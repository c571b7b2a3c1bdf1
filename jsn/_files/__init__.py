"""Station 10, files: one checkpoint of any supported format, array by array.

In: a path. Out: a `Checkpoint`, whose entries are read one at a time, so that a file of any size
needs the memory of its largest array. Nothing in a file is believed before it has been checked,
and nothing in a file is ever run: there is no pickle here. Must not know about weights or rules.
"""

from __future__ import annotations

import os
import pathlib
import stat
from typing import BinaryIO

from jsn import _errors
from jsn._files import _msgpack, _npz, _orbax, _safetensors
from jsn._files._entry import Checkpoint as Checkpoint
from jsn._files._entry import Entry as Entry
from jsn._files._entry import Unreadable as Unreadable
from jsn._files._entry import shorten as shorten

_READERS = {
    "safetensors": _safetensors.index,
    "npz": _npz.index,
    "msgpack": _msgpack.index,
}
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".dill")


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a checkpoint: the arrays are listed, none is read yet.

    Args:
        path: A .safetensors, .npz or .msgpack file, or the directory of an Orbax checkpoint. A
            file with another name is recognized by its first bytes.

    Returns:
        A Checkpoint, to be used in a with statement.

    Raises:
        Unreadable: If there is no such file, or nothing in it can be read.
        ImportError: If reading it needs a package that is not installed.
    """
    path = pathlib.Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            checkpoint = Checkpoint("orbax")
            _orbax.index(path, checkpoint)
            return checkpoint
        if not stat.S_ISREG(mode):
            raise Unreadable("is no regular file")
        return _open_file(path)
    except FileNotFoundError:
        raise Unreadable("no such file or directory") from None
    except OSError as error:
        raise Unreadable(f"cannot be opened: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"cannot be opened: {shorten(str(error))}") from None


def _open_file(path: pathlib.Path) -> Checkpoint:
    if path.suffix.lower() in _PICKLES:
        raise Unreadable(_errors.pickled_checkpoint())
    size = path.stat().st_size
    if not size:
        raise Unreadable("is empty")
    file = path.open("rb")
    try:
        kind = path.suffix.lower()[1:]
        checkpoint = Checkpoint(kind if kind in _READERS else _guess(file))
        checkpoint.files.enter_context(file)
        _READERS[checkpoint.kind](file, size, checkpoint)
    except BaseException:
        file.close()
        raise
    return checkpoint


def _guess(file: BinaryIO) -> str:
    """The format of a file by its first bytes.

    Raises:
        Unreadable: If it is none that is read here.
    """
    head = file.read(4096)
    file.seek(0)
    zipped = head[:2] == b"PK"
    if zipped and b".npy" in head and b"data.pkl" not in head:
        return "npz"
    if zipped or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise Unreadable(_errors.pickled_checkpoint())
    if head[8:9] == b"{":
        return "safetensors"
    if head[:1] and (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return "msgpack"
    raise Unreadable(_errors.unknown_checkpoint())
