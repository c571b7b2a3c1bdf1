"""Hostile files at the front doors, `jsn audit` and `jsn.interop`: a clear line, and no more.

`test_files.py` tests the readers one by one. Here whole files go in by the way a user gives them,
and what counts is what comes out: a status or an error of the documented kind, one line that names
the file, no traceback, little memory, little time, and nothing in the file that ever runs.
"""

import functools
import json
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

import jsn
from benchmarks.reliability import fuzz
from jsn import __main__ as command

PICKLE = fuzz.pickled()
NAMES = ("x.safetensors", "x.npz", "c.npz", "x.msgpack")


@pytest.fixture
def no_code(monkeypatch):
    """Whatever could run what a file says fails the test, by an error that nobody catches."""

    class Ran(BaseException):
        pass

    def refuse(name, *_, **__):
        raise Ran(name)

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (os, ("system", "popen"))):
        for name in names:
            monkeypatch.setattr(module, name, functools.partial(refuse, name))


@pytest.fixture
def audit(tmp_path, monkeypatch, capsys):
    """Runs `jsn audit` on a file in an empty directory: status, stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def call(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        status = command.main(["audit", name, "--json", "out.json"])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


def assert_told(name, result):
    """All is well, or one line says what is not, and no JSON is left behind."""
    status, out, err = result
    assert "Traceback" not in out
    if status == 0:
        assert err == []
        rows = json.loads(pathlib.Path("out.json").read_text())["rows"]
        assert all(np.isfinite(row["sigma"]) and row["sigma"] <= row["bound"] for row in rows)
        os.remove("out.json")
        return
    assert status == 1
    assert len(err) == 1
    assert err[0].startswith(f"jsn audit: {name}: ")
    assert "cannot be audited" not in err[0]  # an error that nobody thought of
    assert all(c.isprintable() for c in err[0])
    assert not os.path.exists("out.json")


# --- jsn audit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_fuzzed_files_are_audited_or_told(audit, no_code, tmp_path, name, count):
    content = fuzz.good_file(tmp_path / "good", name)
    rng, told = random.Random(name), 0
    tracemalloc.start()
    begin = time.process_time()
    for _ in range(count):
        result = audit(name, fuzz.mutated(rng, content))
        assert_told(name, result)
        told += result[0]
    assert time.process_time() - begin < 0.5 * count
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert told > count / 4  # the mutations do break files


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of orbax
def test_fuzzed_directories_are_audited_or_told(audit, tmp_path, count):
    pytest.importorskip("tensorstore")
    pytest.importorskip("orbax.checkpoint")
    good = fuzz.good_directory(tmp_path / "good")
    rng, told = random.Random(0), 0
    for index in range(count):
        name = f"fuzzed{index}"
        fuzz.mutated_directory(rng, good, tmp_path / name)
        result = audit(name)
        assert_told(name, result)
        told += result[0]
    assert told > count / 10


def test_signalling_nans_are_told_like_others(audit, tmp_path):
    kernel = np.full((6, 4), 0x7F800001, np.uint32).view(np.float32)
    content = fuzz.safetensors({"a/kernel": fuzz.tensor([6, 4], 0, 96)}, kernel.tobytes())
    status, _, err = audit("x.safetensors", content)
    what = "a/kernel: not finite: 24 of 24 entries are NaN or infinite"
    assert (status, err) == (1, [f"jsn audit: x.safetensors: {what}"])


LIMIT = """
import resource, sys
from jsn.__main__ import main
import jsn._bounds, jsn._measure, jax.numpy as jnp
main(["audit", "warm.safetensors"])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
resource.setrlimit(resource.RLIMIT_CPU, (60 + int(resource.getrusage(0).ru_utime),) * 2)
sys.stderr.write("---\\n")
for name in sys.argv[1:]:
    print(name, main(["audit", name]), file=sys.stderr)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_files_that_claim_terabytes_fit_into_little_memory(tmp_path):
    """In a process that may use 256 MiB more than it started with, and a minute."""
    pytest.importorskip("safetensors")
    (tmp_path / "warm.safetensors").write_bytes(fuzz.good_file(tmp_path, "x.safetensors"))
    bombs = fuzz.bombs()
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    argv = [sys.executable, "-c", LIMIT, *bombs]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    lines = done.stderr.split("---\n")[1].splitlines()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 2 * len(bombs)
    for name, line, status in zip(bombs, lines[::2], lines[1::2], strict=True):
        assert line.startswith(f"jsn audit: {name}: ")
        assert "memory" not in line.lower(), line  # refused before it was tried
        assert status == f"{name} 1"


# --- jsn.interop --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_fuzzed_state_dicts_of_torch_are_read_or_told(tmp_path, no_code, count):
    pytest.importorskip("safetensors")
    content, rng, read = fuzz.torch_file(), random.Random(1), 0
    path = tmp_path / "x.safetensors"
    for _ in range(count):
        path.write_bytes(fuzz.mutated(rng, content))
        message = ""
        try:
            params, state = jsn.interop.from_torch(path)
            assert {name for name, _ in state.operators} <= {*params}
            read += 1
        except (ValueError, TypeError) as error:
            message = str(error)
        assert message == "" or message.startswith("jsn.interop.from_torch: ")
    assert 0 < read < count


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "pkl", "npz", "ckpt"])
def test_interop_opens_no_pickle(tmp_path, no_code, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(PICKLE)
    with pytest.raises(ValueError, match=r"jsn\.interop\.from_torch: .*safetensors"):
        jsn.interop.from_torch(path)


def hostile_arrays():
    """Values that a tree from an untrusted file can hold, and that are no weights."""
    return {
        "text": "kernel",
        "none": None,
        "object": np.array([object()], object),
        "fields": np.zeros(2, [("a", "f4")]),
        "strings": np.array(["a"]),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(1),
        "deep": functools.reduce(lambda tree, _: {"a": tree}, range(200), np.ones(2)),
        "integers": np.ones((2, 2), int),
    }


@pytest.mark.parametrize("name", hostile_arrays())
def test_hostile_values_are_told_by_name(name):
    value = hostile_arrays()[name]
    dicts = {
        "from_torch": ({"w_orig": value, "w_u": np.ones(2, np.float32)},),
        "from_flax_linen": ({"Dense_0": {"kernel": value}}, {"SN": {"Dense_0/kernel/u": value}}),
        "from_haiku": ({"linear": {"w": value}}, {"linear/~/sn": {"u0": value, "sigma": value}}),
    }
    for function, arguments in dicts.items():
        with pytest.raises((ValueError, TypeError)) as error:
            getattr(jsn.interop, function)(*arguments)
        assert str(error.value).startswith(f"jsn.interop.{function}: "), function


def test_a_safetensors_header_that_lies_is_refused_by_interop(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    for length in (2**63, 2**40, 2**31, 1000):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ValueError, match=r"from_torch: .*x\.safetensors"):
            jsn.interop.from_torch(path)
