"""The benchmark of speed: its numbers mean what the page says, and the whole of it runs."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import _cases, _clock, _contenders, _growth, _report, _speed_page
from benchmarks._methods import Method, form_of
from benchmarks.speed import OTHERS

ROOT = pathlib.Path(__file__).parents[1]
FLAT = _cases.Case("flat", ((6, 4), (3, 3, 2, 5)))
STACKED = _cases.Case("stacked", ((3, 6, 4),), stacked=True)


CASE = {
    "title": "two weights",
    "weights": 2,
    "parameter_bytes": 2**21,
    "made": {
        "date": "2026-01-02T03:04:05+00:00",
        "jsn": "abc",
        "cpu": "a processor",
        "cores": 2,
        "load_before": 0.1,
        "versions": {"jax": "1.2.3"},
    },
    "rows": [
        {"name": "copy of the weights", "ms_median": 1.0, "ratio": 0.5, "ratio_copy": 1.0}
        | {"worst": 7.0, "bytes": 2**22, "temporary": 0, "compile_s": 0.1, "init_s": 0.0},
        {"name": "jsn, default", "ms_median": 123.4, "ratio": 12.3, "ratio_copy": 24.6}
        | {"worst": 1.00012, "bytes": 2**23, "temporary": 2**20, "compile_s": 1, "init_s": 2},
        {"name": "Flax linen", "ms_median": 10.0, "ratio": 1.0, "ratio_copy": 2.0}
        | {"worst": 1.135, "bytes": 2**23, "temporary": 0, "compile_s": 0.5, "init_s": 0.25},
        {"name": "Haiku", "missing": "not installed"},
    ],
}


def test_case_table_has_each_number_in_its_unit():
    table = {row[0]: row[1:] for row in _speed_page.case_table(CASE)[1]}
    jsn = ("123", "12", "25", "0.012", "4.00", "0.50", "1.00", "2.00")
    assert table["**jsn, default**"] == jsn
    assert table["copy of the weights"][3] == "not normalized"
    assert table["Flax linen"][3] == "14"
    assert table["Haiku"][0] == "not installed"


def test_brief_table_takes_the_worst_case_and_says_what_is_missing():
    other = copy.deepcopy(CASE)
    other["rows"][1] |= {"worst": 1.02, "ratio": 1.5}
    head, body = _speed_page.brief_table({"small": CASE, "vit_s": other})
    table = {row[0]: row[1:] for row in body}
    assert len(head) == 4
    assert table["**jsn, default**"] == ("12", "1.50", "2")
    assert table["Haiku"] == ("not installed", "not installed", "–")


@pytest.mark.parametrize(
    ("norm", "text"), [(1.0000001, "0"), (1.00012, "0.012"), (1.5, "50"), (0.98, "-2")]
)
def test_percent_above_one(norm, text):
    assert _speed_page.percent_above(norm) == text


def test_pages_are_rewritten_between_their_markers(tmp_path):
    """What a first result writes, a second one replaces; unmeasured parts say so."""
    _speed_page.write({"vit_s": CASE}, tmp_path)
    page, readme = ((tmp_path / name).read_text() for name in ("speed.md", "README.md"))
    assert page.count("| **jsn, default** | 123 |") == 1
    assert page.count(_speed_page.NOT_YET) == len(_cases.CASES) - 1 + len(OTHERS)
    assert "| **jsn, default** | 12 | 0.012 |" in readme
    words = (ROOT / "README.md").read_text().partition("## What it costs")[0]
    assert readme.startswith(words)
    with pytest.raises(ValueError, match=r"no part '<!-- speed: other -->"):
        _report.write_parts(tmp_path / "x.md", "speed", {"other": ""}, ROOT / "README.md")


@pytest.mark.parametrize("case", [FLAT, STACKED], ids=lambda case: case.title)
def test_worst_norm_is_that_of_the_svd(case):
    weights = next(_cases.trajectory(case, 0))
    norms = _cases.true_norms(case, weights)
    layers = [W if case.stacked else W.reshape(1, -1, W.shape[-1]) for W in weights.values()]
    svd = [float(np.linalg.svd(np.float64(x), compute_uv=False)[..., 0].max()) for x in layers]
    assert _cases.worst_norm(case, weights, norms, weights) == pytest.approx(max(svd), rel=1e-12)
    half = {name: W / np.float32(2) for name, W in weights.items()}
    assert _cases.worst_norm(case, weights, norms, half) == pytest.approx(max(svd) / 2, rel=1e-6)
    # What is no multiple of the raw weight is measured on its own.
    other = {name: W + np.float32(np.arange(W.shape[-1])) for name, W in weights.items()}
    again = max(float(n.max()) for n in _cases.true_norms(case, other).values())
    assert _cases.worst_norm(case, weights, norms, other) == pytest.approx(again, rel=1e-12)


def test_directions_overtake_each_other_on_the_way():
    """The leading direction changes, and each step is as small as the page says."""
    case = _cases.Case("", ((60, 40),))
    leading, before = [], None
    for weights in _cases.trajectory(case, 24):
        (W,) = (np.float64(W) for W in weights.values())
        leading.append(np.linalg.svd(W)[0][:, 0])
        if before is not None:
            assert np.linalg.norm(W - before, 2) < 0.08 * np.linalg.norm(W, 2)
        before = W.copy()
    overlaps = [abs(leading[0] @ u) for u in leading]
    assert min(overlaps) < 0.5


def test_forms_of_the_step_differ_whatever_was_traced_before():
    params = {"kernel": np.random.default_rng(0).standard_normal((80, 70)).astype(np.float32)}
    state, found = Method("lobpcg", 32).init(params, 0), []
    for form in ("lobpcg", "subspace", "thirds", "lobpcg"):
        method = Method(form, 32)
        with form_of(method):
            found.append(method.normalize(params, state)[1].u["kernel"])
    first, subspace, thirds, again = map(np.asarray, found)
    np.testing.assert_array_equal(first, again)
    # Seen as projections: how far the subspaces are from one another.
    apart = lambda x, y: np.linalg.norm(x.T @ x - y.T @ y)
    assert min(apart(first, subspace), apart(first, thirds), apart(subspace, thirds)) > 0.1


@pytest.mark.parametrize(("floor", "n_products"), [("products", 2), ("tracking", 6)])
def test_the_floors_are_so_many_products_for_each_weight(floor, n_products):
    case = _cases.SMOKE_CASES["small"]
    weights, floor = next(_cases.trajectory(case, 0)), getattr(_contenders, floor)()
    floor.start(weights, case.stacked)
    program = jax.jit(floor.normalize).lower(floor.params, floor.state).as_text()
    assert program.count("stablehlo.dot_general") == n_products * len(weights)


def test_made_up_arrays_have_the_shapes_of_the_real_ones():
    make = lambda x: {"a": x @ x.T, "b": x[0]}
    found, real = _growth.made_up(make, np.ones((3, 2), np.float32)), make(np.ones((3, 2)))
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, real)
    assert found["a"].dtype == np.float32
    assert np.ptp(found["a"]) > 0


def test_turns_call_everything_equally_often_and_stop_in_time():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    times = _clock.in_turns(
        {name: lambda name=name: count(name) for name in calls}, seconds=1e-9, most=50
    )
    assert calls == {"a": 10, "b": 10}  # two rounds and at least three that count, of two calls
    assert [len(found) for found in times.values()] == [3, 3]
    assert _clock.ratio([1.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == 3.0


def test_of_several_processes_the_median_counts_and_the_range_is_told():
    def run(ratio):
        return {"rows": [{"name": "jsn", "batch": 4, "ms": 40 * ratio, "ratio": ratio}]}

    found = _clock.typical([run(1.1), run(1.0), run(1.5)])
    (row,) = found["rows"]
    assert found["processes"] == 3
    assert row == {"name": "jsn", "batch": 4, "ms": 44, "ratio": 1.1, "ratios": [1.0, 1.5]}
    assert _speed_page.step_table(found)[1] == [("jsn", "1.100 (1.000 to 1.500)")]


@pytest.mark.slow
def test_smoke():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks", "speed", "--smoke"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    result = json.loads((ROOT / "out" / "speed.json").read_text())
    assert {"small", *OTHERS} <= set(result)
    norms = {row["name"]: row.get("worst") for row in result["small"]["rows"]}
    assert abs(norms["jsn, default"] - 1) < 1e-5
    assert norms["jsn, default"] < norms["Flax linen"]
    same = {row["name"]: row["same_program"] for row in result["evaluation"]["rows"]}
    assert same["jsn, folded"]
    assert not same["Flax linen"]
