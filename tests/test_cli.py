"""`jsn audit FILE`: a table on stdout, one line on stderr where something is wrong."""

import json
import pathlib
import runpy
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from matrices import gaussian

import jsn
from jsn import __main__ as command
from jsn._files import Unreadable

KERNEL = gaussian(0, 6, 4)
BIAS = np.zeros(4, np.float32)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty directory: status, stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        try:
            status = command.main([str(x) for x in argv])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err.splitlines()

    return call


def save(name: str, arrays: dict) -> str:
    """Writes arrays in the format of the name."""
    if name.endswith(".npz"):
        np.savez(name, **arrays)
    elif name.endswith(".msgpack"):
        pathlib.Path(name).write_bytes(serialization.msgpack_serialize(dict(arrays)))
    else:
        from safetensors.numpy import save_file

        save_file(arrays, name)
    return name


def failed(result, name: str) -> str:
    """The one line of a failure, which names the file."""
    status, _, err = result
    assert status == 1
    assert len(err) == 1, err
    assert err[0].startswith(f"jsn audit: {name}: ")
    return err[0]


@pytest.mark.parametrize("name", ["x.npz", "x.msgpack", "x.safetensors"])
def test_a_table_and_json(run, name):
    save(name, {"params/Dense_0/kernel": KERNEL, "params/Dense_0/bias": BIAS})
    status, out, err = run("audit", name, "--json", "out.json")
    assert (status, err) == (0, [])
    assert "Dense_0/kernel" in out
    assert "left alone: Dense_0/bias" in out
    content = json.loads(pathlib.Path("out.json").read_text())
    (row,) = content["rows"]
    assert (row["path"], row["shape"], row["dtype"]) == ("Dense_0/kernel", [6, 4], "float32")
    assert row["sigma"] == pytest.approx(np.linalg.norm(KERNEL.astype(np.float64), 2), rel=1e-9)
    assert row["sigma"] <= row["bound"]
    assert content["source"] == name


def test_it_says_what_audit_says(run):
    params = {"a": {"kernel": KERNEL, "bias": BIAS}, "c": {"kernel": gaussian(1, 3, 3, 4, 2)}}
    save("x.msgpack", {"params": params})
    status, out, _ = run("audit", "x.msgpack", "--json", "file.json")
    assert status == 0
    audit = jsn.audit(params)
    assert out == audit.table() + "\n"
    audit.to_json("tree.json")
    file, tree = (json.loads(pathlib.Path(x).read_text()) for x in ("file.json", "tree.json"))
    assert {**file, "source": 0} == {**tree, "source": 0}


def test_names_split_at_dots_and_torch_weights_are_outputs_first(run):
    weight = gaussian(0, 8, 3, 3, 3)
    save("x.safetensors", {"net.0.weight": weight, "net.1.weight": BIAS, "net.2.kernel": KERNEL})
    status, out, _ = run("audit", "x.safetensors", "--json", "out.json")
    assert status == 0
    rows = json.loads(pathlib.Path("out.json").read_text())["rows"]
    assert [(row["path"], row["view"]) for row in rows] == [
        ("net/0/weight", "27 -> 8"),
        ("net/2/kernel", "6 -> 4"),
    ]
    truth = np.linalg.norm(weight.reshape(8, -1).astype(np.float64), 2)
    assert rows[0]["sigma"] == pytest.approx(truth, rel=1e-9)
    assert "left alone: net/1/weight" in out


def test_only_params_are_audited_where_there_are_params(run):
    tree = {"params": {"kernel": KERNEL}, "opt_state": {"mu": {"kernel": KERNEL}}, "step": 3}
    save("x.msgpack", tree)
    status, out, _ = run("audit", "x.msgpack")
    assert status == 0
    assert "1 weight," in out
    assert "opt_state/mu/kernel (outside params)" in out


def test_boxes_of_nnx_are_opened(run):
    save("x.msgpack", {"layer": {"kernel": {"value": KERNEL}}, "value": BIAS})
    _, out, _ = run("audit", "x.msgpack")
    assert out.splitlines()[2].startswith("layer/kernel ")
    assert "left alone: value" in out


def test_a_plot(run):
    save("x.npz", {"a/kernel": KERNEL, "b/kernel": 2 * KERNEL})
    status, _, err = run("audit", "x.npz", "--plot", "out.png")
    assert (status, err) == (0, [])
    assert pathlib.Path("out.png").read_bytes()[:4] == b"\x89PNG"


def test_an_orbax_directory(run):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = {"params": {"kernel": jnp.asarray(KERNEL, jnp.bfloat16), "bias": BIAS}}
        checkpointer.save(pathlib.Path("ckpt").resolve(), tree)
    status, out, err = run("audit", "ckpt")
    assert (status, err) == (0, [])
    assert "bfloat16" in out


# --- rules --------------------------------------------------------------------------------------


VIEWS = {
    "flax": jsn.Matrix(),
    "torch": jsn.FLAX and jsn.TORCH[-1][1],
    "none": None,
    "in:0": jsn.Matrix(in_axis=0, out_axis=None),
    "out:0": jsn.Matrix(out_axis=0),
    "in:*,out:-1": jsn.Matrix(),
    "in:0,out:1+2,batch:-": jsn.Matrix(in_axis=0, out_axis=(1, 2)),
    "in:-2,batch:0": jsn.Matrix(in_axis=-2, out_axis=None, batch_axis=0),
    "conv:32x32x3": jsn.Conv((32, 32, 3)),
    "conv:8x4,strides:2,padding:VALID,dilation:2": jsn.Conv((8, 4), 2, "VALID", 2),
    "conv:8x8x4,strides:2x1,groups:2": jsn.Conv((8, 8, 4), (2, 1), feature_group_count=2),
}


@pytest.mark.parametrize("text", VIEWS)
def test_each_view_of_the_help_is_an_operator(text):
    assert command._rule(f"a(?=b)c$={text}") == ("a(?=b)c$", VIEWS[text])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("kernel", "no PATTERN="),
        ("=none", "no PATTERN="),
        ("k=what", "'what' means nothing"),
        ("k=", "'' means nothing"),
        ("k=in:x", "invalid literal"),
        ("k=in:0,in:1", "twice"),
        ("k=in:*,out:*", "both None"),
        ("k=in:0,out:0", "names an axis twice"),
        ("k=conv:32", "input_shape"),
        ("k=conv:8x8x3,what:2", "'what' means nothing"),
        ("k=conv:8x8x3,padding:WHAT", "padding"),
    ],
)
def test_rules_that_say_nothing_are_told(run, text, match):
    status, out, err = run("audit", "x.npz", "--rules", text)
    assert (status, out, len(err)) == (2, "", 1)
    assert match in err[0]
    assert f"--rules {text!r}" in err[0]
    assert "Expected PATTERN=VIEW" in err[0]


def test_own_rules_come_first(run):
    save("x.npz", {"head/kernel": KERNEL, "w": KERNEL, "a/kernel": gaussian(0, 3, 2, 5)})
    rules = ("head/=none", "^w$=flax", "a/kernel$=in:0,out:1+2")
    for argv in (("--rules", *rules), [x for rule in rules for x in ("--rules", rule)]):
        status, _, err = run("audit", "x.npz", "--json", "out.json", *argv)
        assert (status, err) == (0, [])
        rows = json.loads(pathlib.Path("out.json").read_text())["rows"]
        assert [(r["path"], r["view"]) for r in rows] == [("a/kernel", "3 -> 10"), ("w", "6 -> 4")]


def test_a_convolution(run):
    save("x.npz", {"blur/kernel": np.ones((3, 3, 1, 1), np.float32) / 9})
    status, out, _ = run("audit", "x.npz", "--rules", "blur=conv:8x8x1")
    assert status == 0
    assert "conv 8x8x1 -> 8x8x1" in out


def test_rules_that_match_nothing_or_do_not_fit(run):
    save("x.npz", {"a/kernel": KERNEL, "b/kernel": KERNEL[0], "i/kernel": KERNEL.astype(int)})
    line = failed(run("audit", "x.npz", "--json", "out.json", "--rules", "typo=none"), "x.npz")
    assert "'typo' matches no name" in line
    line = failed(run("audit", "x.npz", "--rules", "a/=in:0,out:1+2"), "x.npz")
    assert "a/kernel: shape (6, 4)" in line
    line = failed(run("audit", "x.npz", "--rules", "i/=flax"), "x.npz")
    assert "dtype int64 is no real floating point" in line
    status, _, err = run("audit", "x.npz", "--rules", "[=none")
    assert (status, len(err)) == (1, 1)
    status, out, err = run("audit", "x.npz")  # the default rules ask for nothing
    assert (status, err) == (0, [])
    assert "needs at least 2 axes" in out
    assert not pathlib.Path("out.json").exists()


# --- failures -----------------------------------------------------------------------------------


def test_what_is_no_checkpoint(run):
    pathlib.Path("empty.npz").touch()
    pathlib.Path("directory").mkdir()
    pathlib.Path("x.txt").write_text("hello")
    pathlib.Path("x.pt").write_bytes(b"PK\3\4")
    for name, match in {
        "missing.npz": "no such file or directory",
        "empty.npz": "is empty",
        "directory": "no Orbax checkpoint",
        "x.txt": "no format that jsn reads",
        "x.pt": "convert it to safetensors",
        "/dev/zero": "no regular file",
    }.items():
        result = run("audit", name, "--json", "out.json", "--plot", "out.png")
        assert match in failed(result, name)
        assert result[1] == ""
    assert not pathlib.Path("out.json").exists()


@pytest.mark.parametrize("name", ["x.npz", "x.msgpack", "x.safetensors"])
def test_the_readable_part_of_a_truncated_file_is_still_reported(run, name):
    save(name, {"a/kernel": KERNEL, "b/kernel": KERNEL})
    content = pathlib.Path(name).read_bytes()
    at = content.rindex(KERNEL.tobytes()) + 30
    pathlib.Path(name).write_bytes(content[:at])
    result = run("audit", name, "--json", "out.json")
    assert "cut off" in failed(result, name)
    assert "a/kernel" in result[1]
    assert "1 weight," in result[1]
    assert not pathlib.Path("out.json").exists()


@pytest.mark.parametrize("name", ["x.npz", "x.msgpack", "x.safetensors"])
def test_a_nan_weight_is_a_failure_with_a_row(run, name):
    bad = KERNEL.copy()
    bad[1, 2] = np.nan
    save(name, {"good/kernel": KERNEL, "bad/kernel": bad})
    result = run("audit", name, "--json", "out.json", "--plot", "out.png")
    assert "bad/kernel: not finite: 1 of 24 entries" in failed(result, name)
    assert "good/kernel" in result[1]
    assert "! bad/kernel: not finite" in result[1]
    assert not pathlib.Path("out.json").exists()
    assert not pathlib.Path("out.png").exists()


def test_nan_anywhere_fails_but_an_infinite_mask_does_not(run):
    save("nan.npz", {"kernel": KERNEL, "bias": np.full(4, np.nan)})
    assert "bias: not finite: 4 of 4" in failed(run("audit", "nan.npz"), "nan.npz")
    save("mask.npz", {"kernel": KERNEL, "mask": np.full(4, -np.inf)})
    status, out, _ = run("audit", "mask.npz")
    assert status == 0
    assert "! mask: not finite" in out
    save("inf.npz", {"kernel": KERNEL * np.inf})
    assert "kernel: not finite: 24 of 24" in failed(run("audit", "inf.npz"), "inf.npz")


def test_an_unknown_dtype_is_one_line_beside_the_other_rows(run):
    header = {
        "a.weight": {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]},
        "b.weight": {"dtype": "F5", "shape": [6, 4], "data_offsets": [96, 192]},
    }
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + 2 * KERNEL.tobytes()
    pathlib.Path("x.safetensors").write_bytes(content)
    result = run("audit", "x.safetensors")
    assert "b.weight: has the unknown dtype F5" in failed(result, "x.safetensors")
    assert "a/weight" in result[1]


def test_many_problems_are_one_line(run):
    save("x.npz", {f"{i}/kernel": KERNEL * np.nan for i in range(7)})
    assert failed(run("audit", "x.npz"), "x.npz").endswith("; and 4 more problems")


def test_no_weight_at_all(run):
    save("x.npz", {"a/w": KERNEL, "bias": BIAS})
    line = failed(run("audit", "x.npz", "--json", "out.json"), "x.npz")
    assert "no weights among its arrays (a/w, bias): see --rules" in line
    np.savez("none.npz")
    assert "no weights among its arrays (none)" in failed(run("audit", "none.npz"), "none.npz")
    assert not pathlib.Path("out.json").exists()


def test_names_cannot_write_to_the_terminal(run):
    save("x.npz", {"\x1b]0;owned\a/kernel": KERNEL, "[bold]/kernel": KERNEL * np.nan})
    result = run("audit", "x.npz")
    assert "\x1b" not in result[1] + failed(result, "x.npz")
    assert "\\x1b]0;owned\\x07/kernel" in result[1]


def test_outputs_that_cannot_be_written(run):
    save("x.npz", {"kernel": KERNEL})
    for option in ("--json", "--plot"):
        for path in ("missing/out", "."):
            result = run("audit", "x.npz", option, path)
            assert "cannot be written" in failed(result, "x.npz")
            assert result[1] == ""  # known before the long work
        before = pathlib.Path("x.npz").read_bytes()
        assert "would be overwritten" in failed(run("audit", "x.npz", option, "./x.npz"), "x.npz")
        assert pathlib.Path("x.npz").read_bytes() == before
    assert "not written" in failed(run("audit", "x.npz", "--plot", "out.what"), "x.npz")


def test_a_missing_package_is_named(run, monkeypatch):
    save("x.npz", {"kernel": KERNEL})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = failed(run("audit", "x.npz", "--plot", "out.png", "--json", "out.json"), "x.npz")
    assert "pip install 'jsn[audit]'" in line
    assert not pathlib.Path("out.json").exists()
    pathlib.Path("ckpt").mkdir()
    pathlib.Path("ckpt/_METADATA").write_text('{"tree_metadata": {}}')
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert "needs tensorstore" in failed(run("audit", "ckpt"), "ckpt")


def test_what_nobody_thought_of_is_one_line_too(run, monkeypatch):
    def fail(path):
        raise RecursionError("a\nb")

    monkeypatch.setattr(command, "open_checkpoint", fail)
    assert failed(run("audit", "x.npz"), "x.npz").endswith("cannot be audited: RecursionError: a b")


def test_too_little_memory_for_one_array_is_a_problem_of_that_array(run, monkeypatch):
    save("x.npz", {"a/kernel": KERNEL, "b/kernel": KERNEL})
    from jsn import _audit

    measure = _audit.measure

    def scarce(path, *rest):
        if path == "a/kernel":
            raise MemoryError
        return measure(path, *rest)

    monkeypatch.setattr(_audit, "measure", scarce)
    result = run("audit", "x.npz")
    assert "a/kernel: needs more memory" in failed(result, "x.npz")
    assert "b/kernel" in result[1]


def test_interruptions(run, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "open_checkpoint", interrupt)
    assert run("audit", "x.npz") == (130, "", ["jsn: interrupted"])


@pytest.mark.parametrize("argv", [(), ("audit",), ("audit", "x", "--what"), ("what",)])
def test_arguments_that_make_no_sense(run, argv):
    status, out, err = run(*argv)
    assert (status, out, len(err)) == (2, "", 1)
    assert "--help)" in err[0]


def test_help_documents_the_rules(run):
    status, out, _ = run("audit", "--help")
    assert status == 0
    for word in ("in:0,out:1+2,batch:-", "conv:32x32x3,strides:2", "none", ".safetensors", "Orbax"):
        assert word in out


# --- terminals, processes, the demo -------------------------------------------------------------


def test_a_terminal_gets_colors_and_a_progress_bar(run, monkeypatch, capsys):
    save("x.npz", {"a/kernel": KERNEL, "b/kernel": 0 * KERNEL})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = run("audit", "x.npz")
    assert status == 0
    assert "a/kernel" in out
    assert "audit" in "".join(err)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, out, err = run("audit", "x.npz")
    assert (status, err) == (0, [])
    assert "a/kernel" in out


def jsn_process(*argv, cwd):
    return subprocess.run(
        [sys.executable, "-m", "jsn", *argv], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_as_a_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("x.npz", {"a/kernel": KERNEL, "b/kernel": KERNEL * np.nan})
    done = jsn_process("audit", "x.npz", cwd=tmp_path)
    assert done.returncode == 1
    assert "a/kernel" in done.stdout
    assert (
        done.stderr
        == "jsn audit: x.npz: b/kernel: not finite: 24 of 24 entries are NaN or infinite\n"
    )


@pytest.mark.slow
def test_a_large_file_needs_little_more_memory_than_its_largest_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = 256 * 2048 * 4

    def peak(n: int) -> int:
        spans = {f"{i}.weight": [i * size, (i + 1) * size] for i in range(n)}
        info = {"dtype": "F32", "shape": [256, 2048]}
        text = json.dumps({k: info | {"data_offsets": at} for k, at in spans.items()}).encode()
        content = struct.pack("<Q", len(text)) + text + n * gaussian(0, 256, 2048).tobytes()
        pathlib.Path("x.safetensors").write_bytes(content)
        line = (
            "import resource, sys; from jsn.__main__ import main\n"
            "main(['audit', 'x.safetensors'])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        argv = [sys.executable, "-c", line]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        return 1024 * int(done.stderr)

    assert peak(24) - peak(1) < 24 * size / 3


def test_a_reader_that_leaves_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("x.npz", {"a/kernel": KERNEL})
    line = f"{sys.executable} -m jsn audit x.npz | true"
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_closed_pipe_is_written_to_no_more(tmp_path, monkeypatch):
    def closed(audit):
        raise BrokenPipeError

    save(str(tmp_path / "x.npz"), {"a/kernel": KERNEL})
    monkeypatch.setattr(command, "_show", closed)
    with open(tmp_path / "pipe", "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert command.main(["audit", str(tmp_path / "x.npz")]) == 1
        print("lost", flush=True)  # as at exit, when Python flushes what is left
    assert (tmp_path / "pipe").read_text() == ""


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jsn", "audit", "nothing.npz"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(command.__file__, run_name="__main__")
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("jsn audit: nothing.npz: ")


def test_the_demo_of_a_clone(run, monkeypatch, tmp_path):
    package = tmp_path / "clone" / "jsn"
    package.mkdir(parents=True)
    monkeypatch.setattr(command, "__file__", str(package / "__main__.py"))
    status, _, err = run("demo")
    assert status == 1
    assert err == ["jsn demo: the demo is not part of the installed package: clone the repository"
                   " of jsn and run `make demo` there"]  # fmt: skip
    (tmp_path / "clone" / "examples").mkdir()
    script = tmp_path / "clone" / "examples" / "demo.py"
    script.write_text("import sys; sys.exit(len(sys.argv))")
    assert run("demo", "--smoke", "x")[0] == 3


def test_unreadable_is_a_value_error():
    assert issubclass(Unreadable, ValueError)
