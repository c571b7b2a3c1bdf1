"""The demo: it runs as a newcomer runs it, and its scores are what they are called."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jsn.__main__ import main

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = ("samples.png", "norms.png", "training.png")


@pytest.fixture
def judge(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return pytest.importorskip("_demo_judge")


def run_demo(*arguments, **env):
    command = [sys.executable, str(EXAMPLES / "demo.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )


@pytest.mark.slow
def test_smoke_checks_itself_and_writes_table_and_pictures(tmp_path, capsys):
    pytest.importorskip("sklearn")
    done = run_demo("--smoke", "--save", "--out", str(tmp_path / "new" / "folder"))
    assert done.returncode == 0, done.stderr
    for text in ("true norm of conv_1", "product of the true norms", "Fréchet distance", "seed 0"):
        assert text in done.stdout
    for name in PICTURES:
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(b"\x89PNG")
    assert main(["audit", str(tmp_path / "new" / "folder" / "critic_jsn.msgpack")]) == 0
    assert "4x4x32x64  float32  512 -> 64" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "new" / "folder" / "critic_plain.msgpack")]) == 0


def test_missing_dependency_is_one_line_with_the_command(tmp_path):
    """A module that cannot be found, for want of an environment without it."""
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('gone', name='rich')")
    done = run_demo("--smoke", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "rich" in done.stderr
    assert "pip install -e '.[demo]'" in done.stderr


def test_frechet_distance_of_known_gaussians(judge):
    eye, shift = np.eye(4), np.full(4, 3.0)
    zero = np.zeros(4)
    assert judge.frechet_distance((zero, eye), (zero, eye)) == pytest.approx(0, abs=1e-9)
    assert judge.frechet_distance((zero, eye), (shift, eye)) == pytest.approx(36)
    # Commuting covariances: the sum of (root a - root b)^2.
    assert judge.frechet_distance((zero, eye), (zero, 9 * eye)) == pytest.approx(4 * (3 - 1) ** 2)


def test_frechet_distance_is_nan_where_pictures_are(judge):
    broken = (np.zeros(2), np.full((2, 2), np.nan))
    assert np.isnan(judge.frechet_distance(broken, (np.zeros(2), np.eye(2))))


def test_split_keeps_every_class_and_the_range(judge):
    for digits in judge.load_split(seed=0):
        assert set(digits.labels) == set(range(10))
        assert digits.images.shape[1:] == (8, 8, 1)
        assert digits.images.min() == -1
        assert digits.images.max() == 1
