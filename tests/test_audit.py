"""Station 10: what an audit says about each weight is what numpy says in float64."""

import json
import math
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from matrices import gaussian, with_spectrum

import jsn
from jsn import _measure, _report
from jsn._audit import Audit

jsn_audit = jsn.audit


def only(weight, operator=None):
    """The row of a tree with a single weight."""
    rules = jsn.FLAX if operator is None else (("kernel", operator),)
    (row,) = jsn.audit({"kernel": weight}, rules=rules).rows
    return row


def svd(matrix):
    return np.linalg.svd(np.asarray(matrix).astype(np.float64), compute_uv=False)


def strict(path):
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# --- numbers ----------------------------------------------------------------------------------


VIEWS = {
    "dense": (gaussian(0, 12, 5), None, lambda W: W),
    "wide": (gaussian(1, 5, 40), None, lambda W: W),
    "conv": (gaussian(2, 3, 3, 4, 6), None, lambda W: W.reshape(36, 6)),
    "torch": (gaussian(3, 6, 4, 3, 3), jsn.Matrix(out_axis=0), lambda W: W.reshape(6, 36)),
    "split": (
        gaussian(4, 5, 4, 6),
        jsn.Matrix(in_axis=1, out_axis=None),
        lambda W: W.transpose(1, 0, 2).reshape(4, 30),
    ),
    "one": (gaussian(5, 1, 1), None, lambda W: W),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_number_is_that_of_an_svd(name, dtype):
    W, operator, matrix = VIEWS[name]
    W = W.astype(dtype)
    row = only(W, operator)
    values = svd(matrix(W))
    frobenius = np.sqrt(np.square(W.astype(np.float64)).sum())
    assert row.sigma == pytest.approx(values[0], rel=1e-12)
    assert row.condition == pytest.approx(values[0] / values[-1], rel=1e-9)
    assert row.frobenius == pytest.approx(frobenius, rel=1e-13)
    assert row.stable_rank == pytest.approx((frobenius / values[0]) ** 2, rel=1e-11)
    assert values[0] <= row.bound * (1 + 1e-14)
    assert row.sigma <= row.bound <= values[0] * (1 + 1e-6)
    assert (row.shape, row.dtype, row.bytes) == (W.shape, np.dtype(dtype).name, W.nbytes)
    assert row.spectrum == pytest.approx(values, rel=1e-9)
    assert row.warnings == ()
    assert any("jsn.Conv" in note for note in row.notes) == (W.ndim == 4)


def test_stacked_weights_have_one_number_for_each_matrix():
    W = gaussian(0, 2, 6, 3, 4)
    row = only(W, jsn.Matrix(in_axis=1, batch_axis=(0, 2)))
    assert row.view == "2x3 of 6 -> 4"
    for i in range(2):
        for j in range(3):
            values = svd(W[i, :, j])
            assert row.sigma[i, j] == pytest.approx(values[0], rel=1e-12)
            assert row.condition[i, j] == pytest.approx(values[0] / values[-1], rel=1e-9)
            assert row.frobenius[i, j] == pytest.approx(np.linalg.norm(W[i, :, j]), rel=1e-6)
            assert row.bound[i, j] >= row.sigma[i, j]


@pytest.mark.parametrize("batch_axis", [0, 1, 2])
def test_a_batch_axis_of_size_one_is_a_batch_axis(batch_axis):
    W = np.expand_dims(gaussian(0, 4, 3), batch_axis)
    row = only(W, jsn.Matrix(out_axis=-1 if batch_axis < 2 else 1, batch_axis=batch_axis))
    assert row.sigma.shape == row.frobenius.shape == row.bound.shape == (1,)


@pytest.mark.parametrize("exponent", [-1040, -300, -60, 60, 300, 1000])
def test_any_scale(exponent):
    W = np.ldexp(with_spectrum(0, 8, 6, [3, 2, 1, 0.5, 0.25, 0.1]).astype(np.float64), exponent)
    row = only(W)
    assert math.ldexp(row.sigma, -exponent) == pytest.approx(
        3, rel=1e-3 if exponent < -999 else 1e-6
    )
    assert row.stable_rank == pytest.approx(14.3225 / 9, rel=1e-2)
    assert row.bound >= row.sigma


def test_a_side_above_1024_is_estimated_and_says_so(monkeypatch):
    assert _measure.LARGEST_SVD == 1024
    monkeypatch.setattr(_measure, "LARGEST_SVD", 24)
    W = with_spectrum(0, 60, 40, np.linspace(2, 1, 40))
    truth = np.linalg.norm(W.astype(np.float64), 2)
    row = only(W)
    assert row.condition is None
    assert row.spectrum is None
    assert "condition not computed" in row.notes[0]
    assert truth * (1 - 1e-5) <= row.sigma <= truth * (1 + 1e-6)
    assert truth <= row.bound
    wide = only(W.astype(np.float64) * 1e200)  # beyond float32
    assert wide.sigma == pytest.approx(truth * 1e200, rel=1e-5)
    narrow = only(W.astype(ml_dtypes.float8_e4m3fn))
    assert narrow.sigma == pytest.approx(svd(W.astype(ml_dtypes.float8_e4m3fn))[0], rel=1e-5)
    stack = np.stack([W, 3 * W])
    both = only(stack, jsn.Matrix(batch_axis=0)).sigma
    assert both == pytest.approx([truth, 3 * truth], rel=1e-5)


def test_an_estimate_goes_on_until_it_settles(monkeypatch):
    monkeypatch.setattr(_measure, "LARGEST_SVD", 24)
    crowded = 1 - np.linspace(0, 1, 200) ** 8  # ten steps do not tell these apart
    row = only(np.diag(crowded).astype(np.float32))
    assert 1 - 1e-5 <= row.sigma <= 1 + 1e-6  # ten steps leave 3e-5


def test_a_long_matrix_is_reduced_slice_by_slice(monkeypatch):
    monkeypatch.setattr(_measure, "_SLICE", 64)
    for shape in ((1000, 7), (7, 1000), (3, 3, 50, 6)):
        W = gaussian(0, *shape)
        row = only(W)
        values = svd(W.reshape(-1, shape[-1]))
        assert row.sigma == pytest.approx(values[0], rel=1e-12)
        assert row.condition == pytest.approx(values[0] / values[-1], rel=1e-9)
        assert row.frobenius == pytest.approx(np.linalg.norm(W.astype(np.float64)), rel=1e-12)


def test_a_convolution_is_measured_as_one():
    W = jnp.ones((3, 3, 1, 1)) / 9
    row = only(W, jsn.Conv((16, 16, 1)))
    assert row.view == "conv 16x16x1 -> 16x16x1"
    assert 0.95 < row.sigma <= row.bound < 1.01
    assert row.condition is row.stable_rank is row.spectrum is None
    assert row.frobenius == pytest.approx(1 / 3)
    assert any("no matrix" in note for note in row.notes)


def test_where_there_is_no_bound_the_row_says_why(monkeypatch):
    def refuse(W, operator):
        raise ValueError("no bound for this padding\nmore")

    monkeypatch.setattr(_measure, "upper_bound", refuse)
    audit = jsn.audit({"kernel": jnp.eye(3)})
    assert audit.rows[0].bound is None
    assert audit.rows[0].notes == ("no bound: no bound for this padding",)
    assert math.isnan(audit.product)
    assert "no bound for this padding" in audit.table()


# --- warnings ---------------------------------------------------------------------------------


def test_zero_and_dead_weights():
    row = only(jnp.zeros((4, 3)))
    assert row.sigma == row.bound == row.frobenius == row.stable_rank == 0
    assert row.warnings == ("dead: all entries are 0",)
    W = gaussian(0, 6, 5)
    W[2] = W[4] = 0
    W[:, 1] = 0
    assert only(W).warnings == ("dead: 1 of 5 outputs and 2 of 6 inputs have only zeros",)
    assert only(W).condition == np.inf
    assert only(jnp.zeros((3, 3, 1, 1)), jsn.Conv((8, 8, 1))).warnings[0].startswith("dead")


def test_exploding_weights():
    assert only(2e3 * jnp.eye(3)).warnings == ("exploding: sigma is above 1000",)
    assert only(0.9e3 * jnp.eye(3)).warnings == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_spoils_no_other(bad):
    W = gaussian(0, 4, 3)
    W[1, 2] = bad
    audit = jsn.audit({"a": {"kernel": W}, "b": {"kernel": np.eye(2)}})
    broken, fine = audit.rows
    assert broken.warnings == ("not finite: 1 of 12 entries are NaN or infinite",)
    assert math.isnan(broken.sigma)
    assert math.isnan(broken.bound)
    assert fine.sigma == pytest.approx(1)
    assert math.isnan(audit.product)


def test_leaves_left_alone_are_listed_and_looked_at():
    params = {"a": {"kernel": np.eye(2), "bias": np.array([0, np.nan])}, "step": 3}
    audit = jsn.audit(params)
    assert [(x.path, bool(x.warnings)) for x in audit.left_alone] == [
        ("a/bias", True),
        ("step", False),
    ]
    assert "left alone: a/bias, step" in audit.table()
    assert "! a/bias: not finite: 1 of 2" in audit.table()


def test_keys_of_jax_random_are_left_alone():
    audit = jsn.audit({"kernel": jnp.eye(2), "rng": jax.random.key(0)})
    assert audit.left_alone[0].dtype == "key<fry>"
    assert json.dumps(_report.as_dict(audit))


def test_rules_and_errors_are_those_of_init():
    with pytest.raises(ValueError, match=r"jsn\.audit: no leaf"):
        jsn.audit({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"jsn\.audit: 1 rule matches no leaf"):
        jsn.audit({"kernel": jnp.eye(3)}, rules=(("w$", jsn.Matrix()), *jsn.FLAX))
    with pytest.raises(TypeError, match=r"jsn\.audit(?s:.*)int32"):
        jsn.audit({"kernel": jnp.eye(3, dtype=jnp.int32)})
    with pytest.raises(TypeError, match=r"jsn\.audit: expected the SNState"):
        jsn.audit({"kernel": jnp.eye(3)}, state={"kernel": 3})


# --- with a state -----------------------------------------------------------------------------


def test_with_a_state_each_row_tells_the_norm_after_normalization():
    params = {
        "a": {"kernel": gaussian(0, 20, 30), "bias": jnp.ones(3)},
        "b": {"kernel": jnp.zeros((3, 3))},
    }
    state = jsn.init(params)
    moved = jax.tree.map(lambda x: 2.5 * x, params)
    moved["a"]["kernel"] = moved["a"]["kernel"] + 0.5 * gaussian(1, 20, 30)
    a, b = jsn.audit(moved, state=state).rows
    normalized, _ = jsn.normalize(moved, state, n_steps=0)
    assert a.normalized == pytest.approx(np.linalg.norm(normalized["a"]["kernel"], 2), rel=1e-5)
    assert a.normalized >= 1 - 1e-6
    assert b.normalized == 0
    assert "normalized" in jsn.audit(moved, state=state).table()
    assert "normalized" not in jsn.audit(moved).table()


def test_a_state_brings_its_own_views():
    params = {"w": gaussian(0, 3, 4, 5), "kernel": jnp.eye(2)}
    state = jsn.init(params, rules=(("w", jsn.Matrix(in_axis=1, batch_axis=0)),))
    audit = jsn.audit(params, state=state)
    assert [row.path for row in audit.rows] == ["w"]
    assert audit.rows[0].normalized.shape == (3,)
    assert [leaf.path for leaf in audit.left_alone] == ["kernel"]


def test_a_linen_collection_is_a_state():
    import flax.linen as nn

    model = jsn.linen.spectral_norm(nn.Dense)(3)
    variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
    (row,) = jsn.audit(variables["params"], state=variables["sn_state"]).rows
    assert row.normalized == pytest.approx(1, rel=1e-4)


def test_nothing_is_written():
    W = gaussian(0, 4, 3)
    before = W.copy()
    W.flags.writeable = False
    only(W)
    assert (before == W).all()


# --- product ----------------------------------------------------------------------------------


def rows_with(*bounds):
    row = only(jnp.eye(2))
    import dataclasses

    return Audit(tuple(dataclasses.replace(row, bound=bound) for bound in bounds))


def test_the_product_is_rounded_up():
    third = 1 + 2.0**-52
    from fractions import Fraction

    exact = Fraction(third) ** 3
    assert exact <= Fraction(rows_with(third, third, third).product)
    assert rows_with(2.0, np.array([3.0, 0.5])).product == 3
    assert rows_with(1e200, 1e200).product == math.inf
    assert rows_with(1e200, 1e-200, 0.0).product == 0
    assert rows_with().product == 1
    assert rows_with(math.inf, 2.0).product == math.inf
    assert math.isnan(rows_with(math.inf, 0.0).product)
    assert math.isnan(rows_with(math.nan, 2.0).product)


# --- reports ----------------------------------------------------------------------------------


PARAMS = {
    "Dense_2": {"kernel": gaussian(0, 6, 4), "bias": np.zeros(4)},
    "Dense_10": {"kernel": gaussian(1, 4, 4)},
    "[red]<b>$x": {"kernel": np.zeros((2, 2))},
    "nan\x1b[31m": {"kernel": np.full((2, 2), np.nan)},
    "stack": {"kernel": gaussian(2, 3, 4, 5)},
    "singular stack": {"kernel": np.ones((3, 2, 2))},
}
RULES = (("stack", jsn.Matrix(in_axis=1, batch_axis=0)), *jsn.FLAX)


@pytest.fixture(scope="module")
def audit():
    return jsn_audit(PARAMS, rules=RULES)


def test_layer_2_comes_before_layer_10(audit):
    assert [row.path for row in audit.rows][:2] == ["Dense_2/kernel", "Dense_10/kernel"]


def test_the_table_has_a_line_for_each_weight(audit):
    lines = audit.table().splitlines()
    assert lines[0].split()[:6] == ["path", "shape", "dtype", "view", "sigma", "bound"]
    assert lines[2].startswith("Dense_2/kernel")
    assert "\x1b" not in audit.table()
    assert "! nan\\x1b[31m/kernel: not finite" in audit.table()
    assert str(audit) == audit.table()


def test_shown_bounds_are_never_below_the_bound():
    rng = np.random.default_rng(0)
    for x in np.exp(rng.uniform(-80, 80, 500)):
        assert float(_report.number(x, up=True)) >= x
        assert float(_report.number(x)) == pytest.approx(x, rel=1e-4)


def test_rich_shows_names_as_they_are(audit):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(audit)
    shown = console.export_text()
    assert "[red]<b>$x/kernel" in shown
    assert "Dense_10/kernel" in shown


def test_html_escapes_names(audit):
    html = audit._repr_html_()
    assert "[red]&lt;b&gt;$x/kernel" in html
    assert html.count("<tr") == 1 + len(audit.rows)


def test_json_is_valid_and_complete(audit, tmp_path):
    audit.to_json(tmp_path / "a.json")
    content = strict(tmp_path / "a.json")
    rows = {row["path"]: row for row in content["rows"]}
    assert rows["Dense_2/kernel"]["shape"] == [6, 4]
    assert rows["Dense_2/kernel"]["sigma"] == pytest.approx(svd(PARAMS["Dense_2"]["kernel"])[0])
    assert rows["Dense_2/kernel"]["bound"] == audit.rows[0].bound
    assert len(rows["stack/kernel"]["sigma"]) == 3
    broken = rows["nan\x1b[31m/kernel"]
    assert broken["sigma"] is broken["bound"] is None
    assert "sigma is not a number" in broken["warnings"]
    assert rows["[red]<b>$x/kernel"]["condition"] is None
    assert "condition is infinite" in rows["[red]<b>$x/kernel"]["warnings"]
    twins = rows["singular stack/kernel"]
    assert (twins["condition"], twins["warnings"]) == ([None] * 3, ["condition is infinite"])
    assert content["product"] is None
    assert content["left_alone"][0]["path"] == "Dense_2/bias"


def test_json_is_written_whole_or_not_at_all(audit, tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    target.write_text("old")
    monkeypatch.setattr(_report.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        audit.to_json(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_plot_is_a_picture(audit, tmp_path):
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit.plot(tmp_path / "a.png")
        Audit(()).plot(tmp_path / "empty.png")
        Audit(audit.rows * 25).plot(tmp_path / "many.png")  # too many for a name each
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape[1] > 800
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_a_missing_extra_is_named(audit, tmp_path, monkeypatch):
    for package in ("rich", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"rich.*pip install 'jsn\[audit\]'"):
        audit.__rich__()
    with pytest.raises(ImportError, match=r"matplotlib.*pip install 'jsn\[audit\]'"):
        audit.plot(tmp_path / "a.png")
    assert audit.table()


def test_sizes_are_readable():
    shown = [_report.size(n) for n in (0, 999, 1000, 123_456_789, 10**10, 10**13)]
    assert shown == ["0 B", "999 B", "1.0 kB", "123.5 MB", "10.0 GB", "10.0 TB"]
