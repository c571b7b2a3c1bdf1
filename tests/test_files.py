"""Checkpoints of every format come in as they were written; hostile ones with one clear line."""

import builtins
import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import tracemalloc
import zipfile
import zlib

import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from benchmarks.reliability import fuzz
from jsn._files import Unreadable, _entry, _orbax, open_checkpoint

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((6, 4)).astype(np.float32)
DTYPES = ["float64", "float32", "float16", "bfloat16", "int32", "uint8", "bool"]
NARROW = ["float8_e4m3fn", "float8_e5m2"]


def array(dtype: str, shape=(3, 5)) -> np.ndarray:
    return (3 * RNG.standard_normal(shape)).astype(getattr(ml_dtypes, dtype, dtype))


def read(path) -> dict[str, np.ndarray]:
    """All arrays of a file that has no problems."""
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.problems == []
        return {entry.name: entry.read() for entry in checkpoint.entries}


def look(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What can be read of a file, and what is wrong with the rest; "" is the file as a whole."""
    arrays, problems = {}, {}
    try:
        with open_checkpoint(path) as checkpoint:
            problems.update(checkpoint.problems)
            for entry in checkpoint.entries:
                try:
                    arrays[entry.name] = entry.read()
                    assert arrays[entry.name].shape == entry.shape
                    assert arrays[entry.name].dtype == entry.dtype.newbyteorder("=")
                except Unreadable as error:
                    problems[entry.name] = str(error)
    except Unreadable as error:
        problems[""] = str(error)
    assert all("\n" not in what for what in problems.values())
    return arrays, problems


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == np.asarray(expected).tobytes()


def safetensors(header, data=b"", length=None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def put(tmp_path):
    def write(name: str, content: bytes):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


# --- what was written is what is read -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "bfloat16"])
def test_npz(tmp_path, dtype):  # which loses bfloat16
    x, scalar = array(dtype), array(dtype, ())
    for save in (np.savez, np.savez_compressed):
        names = {"a/kernel": x, "f": np.asfortranarray(x), "scalar": scalar, "empty": x[:0]}
        save(tmp_path / "x.npz", **names)
        found = read(tmp_path / "x.npz")
        assert found.keys() == names.keys()
        for name, expected in names.items():
            same(found[name], expected)


def test_npz_of_the_other_byte_order(tmp_path):
    np.savez(tmp_path / "x.npz", big=KERNEL.astype(">f4"))
    same(read(tmp_path / "x.npz")["big"], KERNEL)


@pytest.mark.parametrize("dtype", DTYPES + NARROW)
def test_msgpack(tmp_path, dtype):
    x = array(dtype)
    tree = {"params": {"a": {"kernel": x}, "scalar": x[0, 0]}, "list": [x, 3, "text", None, 1.5]}
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    found = read(tmp_path / "x.msgpack")
    assert {*found} == {"params/a/kernel", "params/scalar", "list/0"}
    same(found["params/a/kernel"], x)
    same(found["list/0"], x)


def test_msgpack_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize({"a": {"kernel": KERNEL}}))
    assert b"chunked" in (tmp_path / "x.msgpack").read_bytes()
    same(read(tmp_path / "x.msgpack")["a/kernel"], KERNEL)


@pytest.mark.parametrize("dtype", DTYPES + NARROW)
def test_safetensors(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    x = array(dtype)
    wide = torch.from_numpy(x.astype(np.float64))
    t = wide.to(getattr(torch, dtype))
    save_file({"a.weight": t, "b": t[0, 0].clone()}, tmp_path / "x.safetensors", {"format": "pt"})
    found = read(tmp_path / "x.safetensors")
    same(found["a.weight"], x)
    same(found["b"], x[0, 0])


def orbax(path, tree, **options):
    ocp = pytest.importorskip("orbax.checkpoint")
    pytest.importorskip("tensorstore")
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(path, tree)
    return path


ORBAX = [{}, {"use_ocdbt": False}, {"use_ocdbt": True, "use_zarr3": True}]


@pytest.mark.parametrize("options", ORBAX, ids=["ocdbt", "files", "zarr3"])
def test_orbax(tmp_path, options):
    x = jnp.asarray(KERNEL, jnp.bfloat16)
    tree = {"params": {"a": {"kernel": x, "bias": np.zeros(4)}, "l": [KERNEL]}, "step": 3}
    found = read(orbax(tmp_path / "x", tree, **options))
    assert {*found} == {"params/a/kernel", "params/a/bias", "params/l/0"}
    same(found["params/a/kernel"], np.asarray(x))
    same(found["params/l/0"], KERNEL)


def test_orbax_within_a_manager(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, args=ocp.args.StandardSave({"kernel": KERNEL}))
        manager.wait_until_finished()
        same(read(tmp_path / "run")["kernel"], KERNEL)
        same(read(tmp_path / "run" / "3")["kernel"], KERNEL)
        manager.save(4, args=ocp.args.StandardSave({"kernel": KERNEL}))
        manager.wait_until_finished()
    with pytest.raises(Unreadable, match="holds 2 checkpoints, audit one of them: 3/default, 4"):
        open_checkpoint(tmp_path / "run")


def test_names_say_nothing_about_the_format(put, tmp_path):
    np.savez(tmp_path / "x.npz", kernel=KERNEL)
    flax = serialization.msgpack_serialize({"kernel": KERNEL})
    tensors = safetensors({"kernel": tensor([6, 4], 0, 96)}, KERNEL.tobytes())
    for content in ((tmp_path / "x.npz").read_bytes(), flax, tensors):
        same(read(put("checkpoint_100", content))["kernel"], KERNEL)


# --- memory -------------------------------------------------------------------------------------


def peak(path) -> int:
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            for entry in checkpoint.entries:
                entry.read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_the_largest_array(tmp_path, put):
    x = np.zeros((2**18,), np.float32)  # 1 MiB each, 24 of them
    names = {f"layer_{i}/kernel": x for i in range(24)}
    np.savez(tmp_path / "x.npz", **names)
    np.savez_compressed(tmp_path / "c.npz", **names)
    header = {
        name: tensor([x.size], i * x.nbytes, (i + 1) * x.nbytes) for i, name in enumerate(names)
    }
    put("x.safetensors", safetensors(header, b"\0" * 24 * x.nbytes))
    put("x.msgpack", serialization.msgpack_serialize(dict(names)))
    for name in ("x.npz", "c.npz", "x.safetensors", "x.msgpack"):
        assert peak(tmp_path / name) < 4 * x.nbytes, name


# --- hostile files ------------------------------------------------------------------------------

GOOD = {"a": tensor([2, 2], 0, 16), "b": tensor([2], 16, 24)}
DATA = bytes(24)
HOSTILE_SAFETENSORS = {
    "empty": (b"", "is empty"),
    "short": (b"\1\2\3", "3 bytes"),
    "huge header": (safetensors(b"{}", length=2**63), "claims 9223372036854775808 bytes"),
    "long header": (safetensors(b" " * (2**24 + 1)), "refused"),
    "no json": (safetensors(b"{nonsense"), "no JSON"),
    "no utf-8": (safetensors(b'{"\xff": 1}'), "no JSON"),
    "nested": (safetensors(b"[" * 100_000), "no JSON"),
    "long number": (safetensors(b'{"a": ' + b"9" * 10_000 + b"}"), "no JSON"),
    "a list": (safetensors([1, 2]), "no JSON object"),
    "twice": (safetensors(b'{"a": 1, "a": 2}'), "twice"),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_as_a_whole(put, name):
    content, match = HOSTILE_SAFETENSORS[name]
    with pytest.raises(Unreadable, match=match):
        open_checkpoint(put("x.safetensors", content))


HOSTILE_TENSORS = {
    "negative offset": (tensor([2], -8, 0), "offsets"),
    "reversed": (tensor([2], 24, 16), "offsets"),
    "no list": ({"dtype": "F32", "shape": [2], "data_offsets": 3}, "offsets"),
    "no offsets": ({"dtype": "F32", "shape": [2]}, "no offsets"),
    "true": ({"dtype": "F32", "shape": [2], "data_offsets": [False, True]}, "offsets"),
    "no object": (7, "no offsets"),
    "beyond": (tensor([2**40], 24, 24 + 2**42), "cut off"),
    "overlap": (tensor([2], 8, 16), "overlaps"),
    "gap": (tensor([1], 28, 32), "unused bytes"),
    "wrong size": (tensor([3], 24, 32), "not those of float32 in shape"),
    "unknown dtype": (tensor([2], 24, 32, "F4711"), "unknown dtype F4711"),
    "no dtype": ({"shape": [2], "data_offsets": [24, 32]}, "unknown dtype None"),
    "negative shape": (tensor([-2, -1], 24, 32), "no list of sizes"),
    "shape of floats": (tensor([2.0], 24, 32), "no list of sizes"),
    "no shape": ({"dtype": "F32", "data_offsets": [24, 32]}, "no list of sizes"),
    "overflow": (tensor([2**40, 2**40], 24, 24), "beyond any array"),
    "many axes": (tensor([1] * 70, 24, 28), "beyond any array"),
    "zero times huge": (tensor([0, 2**62], 24, 24), "beyond any array"),
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensors_leave_the_others_readable(put, name):
    info, match = HOSTILE_TENSORS[name]
    arrays, problems = look(
        put("x.safetensors", safetensors(GOOD | {"bad": info}, DATA + bytes(8)))
    )
    assert match in problems["bad"]
    assert arrays.keys() >= {"a"}
    assert "bad" not in arrays or name == "gap"


def test_names_are_only_names(put):
    names = ["../../etc/passwd", "/root/x", "", "a\0b", "\x1b[31m", "x" * 100_000, "\ud800"]
    header = {name: tensor([], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    path = put("x.safetensors", safetensors(header, bytes(4 * len(names))))
    assert {*read(path)} == {*names}


@pytest.mark.parametrize("file", ["x.safetensors", "x.npz", "c.npz", "x.msgpack"])
def test_cut_off_anywhere(put, tmp_path, file):
    """What is whole is read, what is not is named, wherever the file ends."""
    names = {"a": KERNEL, "b": 2 * KERNEL}
    np.savez(tmp_path / "x.npz", **names)
    np.savez_compressed(tmp_path / "c.npz", **names)
    put("x.msgpack", serialization.msgpack_serialize(dict(names)))
    header = {"a": tensor([6, 4], 0, 96), "b": tensor([6, 4], 96, 192)}
    put("x.safetensors", safetensors(header, b"".join(x.tobytes() for x in names.values())))
    content, most = (tmp_path / file).read_bytes(), 0
    assert {*read(tmp_path / file)} == {*names}
    for end in range(0, len(content), 3):
        arrays, problems = look(put(f"cut{(tmp_path / file).suffix}", content[:end]))
        assert problems
        for name, found in arrays.items():
            same(found, names[name])
        assert len(arrays) >= most
        most = len(arrays)
    assert most >= 1  # something was rescued


def member(header: str | bytes, data: bytes, version=b"\1\0") -> bytes:
    """A .npy file by hand."""
    text = header.encode() if isinstance(header, str) else header
    return (
        b"\x93NUMPY"
        + version
        + struct.pack("<H" if version == b"\1\0" else "<I", len(text))
        + text
        + data
    )


def npz(content: bytes, method=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("good.npy", member(HEADER % "(2,)", bytes(8)))
        archive.writestr("bad.npy", content)
    return file.getvalue()


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"
HOSTILE_MEMBERS = {
    "huge shape": (member(HEADER % "(1099511627776,)", bytes(8)), "not those of float32"),
    "overflow": (member(HEADER % "(2**40,)", bytes(8)), "corrupt"),
    "negative": (member(HEADER % "(-2,)", bytes(8)), "no list of sizes"),
    "short": (member(HEADER % "(3,)", bytes(8)), "8 bytes, not those"),
    "long": (member(HEADER % "(1,)", bytes(8)), "8 bytes, not those"),
    "no numpy": (b"hello world, this is text", "no numpy array"),
    "empty": (b"", "no numpy array"),
    "object": (member(HEADER.replace("<f4", "|O") % "(1,)", bytes(8)), "Python objects"),
    "fields": (
        member("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }", bytes(8)),
        "unknown dtype",
    ),
    "text": (member(HEADER.replace("<f4", "<U2") % "(1,)", bytes(8)), "unknown dtype"),
    "bfloat16": (member(HEADER.replace("<f4", "|V2") % "(4,)", bytes(8)), "numpy loses bfloat16"),
    "code": (member("__import__('os').system('touch /tmp/jsn_was_here')", bytes(8)), "corrupt"),
    "nested": (member("(" * 9000, bytes(8)), "corrupt"),
    "long header": (member(HEADER % "(2,)" + " " * 60_000, bytes(8)), "absurdly long"),
    "header beyond": (member(b"", b"", b"\2\0")[:8] + b"\xff\xff\xff\xff" + bytes(8), "absurdly"),
    "version": (member(HEADER % "(2,)", bytes(8), b"\7\0"), "version 7.0"),
    "many axes": (member(HEADER % f"({'1,' * 70})", bytes(4)), "beyond any array"),
}


@pytest.mark.parametrize("name", HOSTILE_MEMBERS)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_hostile_members_leave_the_others_readable(put, name, method):
    content, match = HOSTILE_MEMBERS[name]
    arrays, problems = look(put("x.npz", npz(content, method)))
    assert match in problems["bad"]
    assert {*arrays} == {"good"}
    assert not os.path.exists("/tmp/jsn_was_here")


def test_hostile_archives(put):
    plain = npz(member(HEADER % "(2,)", bytes(8)))
    at = plain.rindex(b"PK\1\2")  # the entry of bad.npy in the list
    encrypted = bytearray(plain)
    encrypted[at + 8] |= 1
    assert "encrypted" in look(put("x.npz", bytes(encrypted)))[1]["bad"]
    lies = bytearray(plain)
    lies[at + 42 : at + 46] = struct.pack("<I", 5)  # where its data lies
    assert "no member where" in look(put("x.npz", bytes(lies)))[1]["bad"]
    wrong = bytearray(plain)
    wrong[wrong.index(b"bad.npy") - 16] ^= 1  # the walk reads this checksum, the list has its own
    wrong[wrong.index(b"(2,)", wrong.index(b"bad.npy")) + 9] ^= 1  # a byte of the data
    assert "checksum" in look(put("x.npz", bytes(wrong)))[1]["bad"]
    other = npz(member(HEADER % "(2,)", bytes(8)), zipfile.ZIP_BZIP2)
    assert "method 12" in look(put("x.npz", other))[1]["bad"]
    huge = bytearray(plain)
    huge[-10:-6] = struct.pack("<I", 2**31)
    assert "is cut off or corrupt" in look(put("x.npz", bytes(huge)))[1][""]
    assert "is no .npz file" in look(put("x.npz", b"PK\3\4" + b"x" * 50))[1][""]
    assert (
        "list of members"
        in look(
            put(
                "x.npz",
                plain[:-22]
                + bytes(2**24)
                + b"PK\5\6"
                + bytes(8)
                + struct.pack("<I", 2**24 + 1)
                + bytes(6),
            )
        )[1][""]
    )


def test_a_list_too_long_is_refused_in_large_archives_too(put):
    plain = npz(member(HEADER % "(2,)", bytes(8)))
    zip64 = b"PK\6\6" + bytes(36) + struct.pack("<Q", 2**24 + 1) + bytes(8)
    end = b"PK\5\6" + bytes(8) + b"\xff\xff\xff\xff" + bytes(6)
    problems = look(put("x.npz", plain[:-22] + bytes(2**24) + zip64 + end))[1]
    assert "list of members of 16777217 bytes: refused" in problems[""]


def test_a_member_that_breaks_off_in_the_middle_leaves_the_others_readable(put):
    noise = np.random.default_rng(0).bytes(120_000)  # stored in blocks, each with its length
    content = npz(member(HEADER % "(30000,)", noise), zipfile.ZIP_DEFLATED)
    at = content.index(noise[1000:1100])
    content = content[: at + 60_000] + bytes(50_000) + content[at + 110_000 :]
    arrays, problems = look(put("x.npz", content))
    assert {*arrays} == {"good"}
    assert problems["bad"].startswith("is corrupt: Error -3 while decompressing data")
    arrays, problems = look(put("x.npz", content[: at + 60_000]))
    assert {*arrays} == {"good"}
    assert problems["bad"].startswith("is cut off: the file ends ")


def test_a_compressed_member_is_unpacked_piece_by_piece(tmp_path):
    x = np.repeat(np.arange(8, dtype=np.float32), 2**18)  # 8 MiB, of which little is left
    np.savez_compressed(tmp_path / "x.npz", x=x)
    same(read(tmp_path / "x.npz")["x"], x)
    # Nothing, a million bytes long, and then a little:
    stream = b"\0\0\0\xff\xff" * 2**18 + zlib.compress(KERNEL.tobytes(), wbits=-15)
    found = np.empty(KERNEL.nbytes, np.uint8)
    _entry.fill(found, _entry.inflate(io.BytesIO(stream), 0, len(stream)))
    assert found.tobytes() == KERNEL.tobytes()


def test_a_zip_bomb_is_refused(put):
    content = npz(member(HEADER % "(25000000,)", bytes(100_000_000)), zipfile.ZIP_DEFLATED)
    assert len(content) < 10**6
    tracemalloc.start()
    arrays, problems = look(put("x.npz", content))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert "claim to unpack" in problems["bad"]
    assert {*arrays} == {"good"}


def flax_array(shape=(2,), dtype="float32", data=bytes(8)) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


HOSTILE_LEAVES = {
    "huge shape": (flax_array((2**40,)), "not those of float32"),
    "negative": (flax_array((-2, -1)), "no list of sizes"),
    "unknown dtype": (flax_array(dtype="object"), "unknown dtype object"),
    "no dtype": (flax_array(dtype=3), "unknown dtype int"),
    "no shape": (flax_array(shape=3), "its shape is no list"),
    "float shape": (flax_array(shape=(2.0,)), "a size is no integer"),
    "many axes": (flax_array(shape=(1,) * 65), "its shape is no list"),
    "no bytes": (flax_array(data="text"), "not where they should be"),
    "no triple": (msgpack.ExtType(1, msgpack.packb((1, 2))), "no [shape, dtype, bytes]"),
    "empty": (msgpack.ExtType(1, b""), "corrupt"),
}


@pytest.mark.parametrize("name", HOSTILE_LEAVES)
def test_hostile_leaves_leave_the_others_readable(put, name):
    leaf, match = HOSTILE_LEAVES[name]
    path = put(
        "x.msgpack", msgpack.packb({"good": flax_array(), "bad": leaf, "late": flax_array()})
    )
    arrays, problems = look(path)
    assert match in problems["bad"]
    assert {*arrays} == {"good", "late"}


HOSTILE_MSGPACK = {
    "a list": (msgpack.packb([1, 2]), "starts with a list"),
    "a number": (b"\x07", "starts with a int"),
    "unknown byte": (b"\x81\xc1", "means nothing"),
    "huge map": (b"\xdf\xff\xff\xff\xff", "the file ends in the middle"),
    "huge string": (b"\x81\xdb\xff\xff\xff\xff", "stands for a key"),
    "huge value": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "the file ends in the middle"),
    "huge array": (b"\x81\xa1a\xc9\xff\xff\xff\xff\1", "bytes too early"),
    "deep": (b"\x81\xa1a" * 100_000, "nested deeper"),
    "deep list": (b"\x81\xa1a" + b"\x91" * 100_000, "nested deeper"),
    "strange key": (b"\x81\x90\x01", "stands for a key"),
    "chunks": (
        msgpack.packb({"__msgpack_chunked_array__": True, "shape": {"0": 2**60}, "chunks": {}}),
        "lacks its shape or chunks",
    ),
    "other chunks": (
        msgpack.packb(
            {"__msgpack_chunked_array__": True, "shape": {"0": 5}, "chunks": {"0": flax_array()}}
        ),
        "do not add up",
    ),
    "no chunks": (
        msgpack.packb({"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": 3}}),
        "a chunk is no array",
    ),
    "half chunks": (
        msgpack.packb({"__msgpack_chunked_array__": True, "x": 1}),
        "no array in chunks",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_MSGPACK)
def test_hostile_msgpack_as_a_whole(put, name):
    content, match = HOSTILE_MSGPACK[name]
    with pytest.raises(Unreadable, match=match):
        open_checkpoint(put("x.msgpack", content))


def test_msgpack_keys_of_other_writers_and_bytes_after_the_end(put):
    content = msgpack.packb({"a": {1: flax_array(), -5: flax_array(), 300: flax_array()}}) + b"xyz"
    arrays, problems = look(put("x.msgpack", content))
    assert {*arrays} == {"a/1", "a/-5", "a/300"}
    assert problems == {"": "3 bytes follow after its end"}


def test_names_cannot_fill_the_memory(put):
    key, leaves = "k" * 1000, {str(i): flax_array() for i in range(2000)}
    tree = leaves
    for _ in range(50):
        tree = {key: tree}
    assert "names of over" in look(put("x.msgpack", msgpack.packb(tree)))[1].popitem()[1]


PICKLES = ["x.pt", "x.pth", "x.bin", "x.pkl", "x.ckpt", "x.PKL"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/jsn_was_here",)


@pytest.mark.parametrize("name", [*PICKLES, "model", "x.npz", "x.safetensors", "x.msgpack"])
def test_no_pickle_is_ever_opened(put, tmp_path, monkeypatch, name):
    contents = [pickle.dumps({"kernel": Bomb()}, protocol) for protocol in (0, 2, 4, 5)]
    if name in ("x.npz", "model"):
        np.savez(tmp_path / "o.npz", x=np.array([Bomb()], dtype=object))
        contents.append((tmp_path / "o.npz").read_bytes())

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    for content in contents:
        arrays, problems = look(put(name, content))
        assert problems
        assert not arrays
    if name in PICKLES:
        assert "convert it to safetensors" in problems[""]
    assert not os.path.exists("/tmp/jsn_was_here")


def test_torch_files_are_refused_by_their_content(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "checkpoint_3")
    with pytest.raises(Unreadable, match=r"is a pickle.*convert it to safetensors"):
        open_checkpoint(tmp_path / "checkpoint_3")


def test_what_is_no_file(put, tmp_path):
    for path, match in (
        (tmp_path / "missing.npz", "no such file"),
        (tmp_path / "missing.npz" / "x", "no such file|cannot be opened"),
        (tmp_path, "no Orbax checkpoint"),
        ("/dev/zero", "no regular file"),
        ("a\0b", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        (put("x.txt", b"hello"), "no format that jsn reads"),
        (put("x", b"\1"), "no format that jsn reads"),
    ):
        with pytest.raises(Unreadable, match=match):
            open_checkpoint(path)


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(Unreadable, match="no regular file"):
        open_checkpoint(tmp_path / "x.npz")


# --- hostile directories ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax")
    return orbax(path / "x", {"good": KERNEL, "bad": KERNEL}, use_ocdbt=False)


def altered(checkpoint, tmp_path, name, change):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    file = path / name
    file.write_bytes(change(file.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "corrupt _METADATA"),
        (b"[]", "corrupt _METADATA"),
        (b"[" * 100_000, "corrupt _METADATA"),
        (b'{"tree_metadata": {"a": 3}}', "corrupt _METADATA"),
        (b'{"tree_metadata": [1]}', "corrupt _METADATA"),
        (b" " * (2**24 + 1), "refused"),
    ],
)
def test_hostile_metadata(tmp_path, content, match):
    (tmp_path / "_METADATA").write_bytes(content)
    with pytest.raises(Unreadable, match=match):
        open_checkpoint(tmp_path)


def test_a_directory_of_too_many_arrays_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(_orbax, "MOST_ENTRIES", 1)
    with pytest.raises(Unreadable, match="more than 1 entries: refused"):
        open_checkpoint(checkpoint)


def test_names_do_not_lead_out_of_the_directory(checkpoint, tmp_path):
    path = altered(
        checkpoint, tmp_path, "_METADATA", lambda x: x.replace(b'"key": "bad"', b'"key": "../good"')
    )
    assert "leads out of the directory" in look(path)[1]["../good"]


def test_hostile_arrays_of_orbax(checkpoint, tmp_path):
    def resized(content):
        info = json.loads(content)
        return json.dumps(info | {"shape": [2**30, 2**10]}).encode()

    def text(content):
        info = json.loads(content)
        return json.dumps(info | {"dtype": "<U4"}).encode()

    def raw(content):
        info = json.loads(content)
        return json.dumps(info | {"dtype": "|V4", "fill_value": None}).encode()

    for change, match in (
        (resized, "claim to unpack"),
        (text, "cannot be read"),
        (raw, "unknown dtype"),
        (bytes, ""),
    ):
        path = altered(checkpoint, tmp_path, "bad/.zarray", change)
        arrays, problems = look(path)
        assert {*arrays} == {"good", "bad"} - {*problems}
        assert match in problems.get("bad", "")
        shutil.rmtree(path)
    path = altered(checkpoint, tmp_path, "bad/0.0", lambda x: x[:-5])
    assert "cannot be read" in look(path)[1]["bad"]
    shutil.rmtree(path / "bad")
    assert "cannot be read" in look(path)[1]["bad"]


# --- fuzzing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "c.npz", "x.msgpack"])
def test_fuzzed_files_cost_neither_memory_nor_time(put, tmp_path, name):
    """Every mutation gives arrays or a clear line; for safetensors as its own library judges."""
    safe_open = pytest.importorskip("safetensors").safe_open
    tree = {"a.kernel": KERNEL, "b": KERNEL[0]}
    np.savez(tmp_path / "x.npz", **tree)
    np.savez_compressed(tmp_path / "c.npz", **tree)
    put("x.msgpack", serialization.msgpack_serialize({"params": dict(tree)}))
    header = {"a.kernel": tensor([6, 4], 0, 96), "b": tensor([4], 96, 112)}
    put("x.safetensors", safetensors(header, bytes(112)))
    content, rng = (tmp_path / name).read_bytes(), random.Random(name)
    path = tmp_path / f"fuzzed{(tmp_path / name).suffix}"
    start = time.process_time()
    tracemalloc.start()
    for _ in range(250):
        path.write_bytes(fuzz.mutated(rng, content))
        _, problems = look(path)
        if name == "x.safetensors":
            try:
                with safe_open(path, framework="numpy") as file:
                    file.keys()
                accepted = True
            except Exception:
                accepted = False
            assert accepted == (not problems)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**25
    assert time.process_time() - start < 60


def test_shorten_makes_text_safe_to_print():
    assert _entry.shorten("a\x1b[31m\n\u202eb\ud800") == "a\\x1b[31m\\n\\u202eb\\ud800"
    assert len(_entry.shorten("x" * 10**6)) <= 80
