"""Part two: hostile files. Mutations of good ones, bombs, pickles; `jsn audit` has to say so.

In: a seed. Out: files of each format. `run` gives them to `jsn audit` and to
`jsn.interop.from_torch`, and counts what came of them: audited, told in one line, crashed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

KERNEL = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


class Bomb:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch jsn_was_here",)


def pickled() -> bytes:
    """A pickle that runs a command."""
    return pickle.dumps({"kernel": Bomb()})


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file by hand."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """What a safetensors header says about one tensor."""
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


# --- good files ---------------------------------------------------------------------------------


def good_file(directory: pathlib.Path, name: str) -> bytes:
    """A small checkpoint: x.safetensors, x.npz, c.npz (compressed) or x.msgpack."""
    tree = {"a/kernel": KERNEL, "b/kernel": 2 * KERNEL, "b/bias": KERNEL[0]}
    if name == "x.safetensors":
        ends = np.cumsum([0, *(x.nbytes for x in tree.values())]).tolist()
        header = {
            name: tensor(list(x.shape), begin, end)
            for (name, x), begin, end in zip(tree.items(), ends, ends[1:], strict=False)
        }
        return safetensors(header, b"".join(x.tobytes() for x in tree.values()))
    if name == "x.msgpack":
        from flax import serialization

        return serialization.msgpack_serialize({"params": dict(tree)})
    directory.mkdir(exist_ok=True)
    (np.savez if name == "x.npz" else np.savez_compressed)(directory / name, **tree)  # type: ignore
    return (directory / name).read_bytes()


def good_directory(directory: pathlib.Path) -> pathlib.Path:
    """A small checkpoint of Orbax, each array in files of its own."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(directory.resolve(), {"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}})
    return directory


def torch_file() -> bytes:
    """A state dict of a spectrally normalized torch module, as safetensors."""
    prefix = "l.parametrizations.weight"
    tree = {
        f"{prefix}.original": KERNEL,
        f"{prefix}.0._u": KERNEL[:, 0],
        f"{prefix}.0._v": KERNEL[0],
        "l.bias": KERNEL[:, 0],
    }
    ends = np.cumsum([0, *(x.nbytes for x in tree.values())]).tolist()
    spans = zip(tree.items(), ends, ends[1:], strict=False)
    header = {name: tensor(list(x.shape), begin, end) for (name, x), begin, end in spans}
    return safetensors(header, b"".join(x.tobytes() for x in tree.values()))


# --- bad files ----------------------------------------------------------------------------------

LENGTHS = (0, 1, 2**30, 2**31 - 1, 2**31, 2**32 - 1)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A file with a few bytes changed, lost or added, more often near its start and its end."""
    b = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        near = rng.randrange(min(len(b), rng.choice([16, 300, len(b)])))
        at = len(b) - 1 - near if rng.random() < 0.2 else near
        kind = rng.randrange(7)
        if kind == 0:
            b[at] = rng.randrange(256)
        elif kind == 1:
            del b[at : at + rng.choice([1, 4, 50])]
        elif kind == 2:
            b[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
        elif kind == 3:
            b[at : at + 4] = struct.pack("<I", rng.choice(LENGTHS))
        elif kind == 4:
            b[at : at + 4] = struct.pack(">I", rng.choice(LENGTHS))
        elif kind == 5:
            b[at:at] = b[: rng.choice([4, 40, 400])]
        else:
            digits = [i for i, c in enumerate(b[:600]) if 48 <= c < 58]
            if digits:
                b[rng.choice(digits)] = rng.choice(b"0123456789-")
        b = b or bytearray(b"x")
    return bytes(b)


def mutated_directory(rng: random.Random, good: pathlib.Path, to: pathlib.Path) -> None:
    """A directory of Orbax in which one file has been changed, or lost."""
    shutil.copytree(good, to)
    files = sorted(path for path in to.rglob("*") if path.is_file())
    path = rng.choice([path for path in files if path.name != "_sharding"] + [to / "_METADATA"])
    if rng.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(mutated(rng, path.read_bytes() or b"x"))


def bombs() -> dict[str, bytes]:
    """Small files that claim to be terabytes, or that unpack to them."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }"
    kernel = lambda n: b"\x93NUMPY\1\0" + struct.pack("<H", len(n)) + n.encode()
    huge = 2**42
    found = {
        "header.safetensors": struct.pack("<Q", 2**40) + b"{}",
        "offsets.safetensors": safetensors({"a/kernel": tensor([2**20, 2**20], 0, huge)}, bytes(9)),
        "shape.safetensors": safetensors({"a/kernel": tensor([2**20, 2**20], 0, 8)}, bytes(8)),
        "bin.msgpack": b"\x81\xa1a\xc6\xff\xff\xff\xff",
        "ext.msgpack": b"\x81\xa8a/kernel\xc9\xff\xff\xff\xff\1" + bytes(100),
        "map.msgpack": b"\xdf\xff\xff\xff\xff\xa1a\xc0",
    }
    for name, method, fill in (
        ("shape.npz", zipfile.ZIP_STORED, 0),
        ("bomb.npz", zipfile.ZIP_DEFLATED, 2**28),
    ):
        member = kernel(header % (2**10, 2**16 if fill else 2**30))
        found[name] = _zipped(member, fill, method)
    return found


def _zipped(member: bytes, fill: int, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive, archive.open("a/kernel.npy", "w") as out:
        out.write(member)
        for _ in range(fill // 2**22):
            out.write(bytes(2**22))
    return file.getvalue()


# --- what comes of them -------------------------------------------------------------------------

FILES = ("x.safetensors", "x.npz", "c.npz", "x.msgpack")
TARGETS = (*FILES, "orbax", "torch")
NAMES = {
    "x.safetensors": "jsn audit, safetensors",
    "x.npz": "jsn audit, npz",
    "c.npz": "jsn audit, npz, compressed",
    "x.msgpack": "jsn audit, Flax msgpack",
    "orbax": "jsn audit, Orbax directory",
    "torch": "jsn.interop.from_torch, safetensors",
}


def run(count: int, tick: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """So many mutations of each kind of file, a tenth of it for directories: what came of them."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        here, before = pathlib.Path(name), os.getcwd()
        os.chdir(here)
        try:
            # Once before, so that what is compiled on first use counts for no input.
            (here / "warm.safetensors").write_bytes(good_file(here, "x.safetensors"))
            _audit("warm.safetensors")
            for target in TARGETS:
                inputs = max(1, count // 10) if target == "orbax" else count
                rows.append(_fuzz(here, target, inputs, tick))
        finally:
            os.chdir(before)
    return rows


def _fuzz(here: pathlib.Path, target: str, count: int, tick: Callable[[], None]) -> dict[str, Any]:
    rng, row = random.Random(target), {"read": 0, "told": 0, "crashes": 0}
    if target == "orbax":
        good, content = good_directory(here / "good"), b""
    else:
        good, content = None, torch_file() if target == "torch" else good_file(here, target)
    longest, begin = 0.0, time.perf_counter()
    tracemalloc.start()
    for _ in range(count):
        path = here / ("fuzzed" if good else f"fuzzed{pathlib.Path(target).suffix}")
        path = path.with_suffix(".safetensors") if target == "torch" else path
        if good:
            shutil.rmtree(path, ignore_errors=True)
            mutated_directory(rng, good, path)
        else:
            path.write_bytes(mutated(rng, content))
        start = time.perf_counter()
        row[(_import if target == "torch" else _audit)(path.name)] += 1
        longest = max(longest, time.perf_counter() - start)
        tick()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "input": NAMES[target],
        "inputs": count,
        **row,
        "code_ran": (here / "jsn_was_here").exists(),
        "peak_mib": round(peak / 2**20, 1),
        "longest_s": round(longest, 2),
        "seconds": round(time.perf_counter() - begin),
    }


def _audit(name: str) -> str:
    """What `jsn audit` made of a file: read, told (one line that names it), or crashes."""
    from jsn import __main__ as command

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command.main(["audit", name])
    except BaseException:
        return "crashes"
    lines = err.getvalue().splitlines()
    if status == 0 and not lines:
        return "read"
    told = status == 1 and len(lines) == 1 and lines[0].startswith(f"jsn audit: {name}: ")
    return "told" if told and "cannot be audited" not in lines[0] else "crashes"


def _import(name: str) -> str:
    import jsn

    try:
        jsn.interop.from_torch(name)
    except (ValueError, TypeError) as error:
        return "told" if str(error).startswith("jsn.interop.from_torch: ") else "crashes"
    except BaseException:
        return "crashes"
    return "read"
