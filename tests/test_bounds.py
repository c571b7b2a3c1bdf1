"""Station 8: upper_bound never lies below the norm, and lies close above it."""

import ctypes
import functools
import platform
import re
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from jax.sharding import NamedSharding, PartitionSpec
from matrices import PROBLEMS, gaussian, true_norm
from oracles import assert_certified, certifies, dense, exactly_bounds, hard_layer, hard_matrix

import jsn
from jsn import _bounds, _certify, _rounding, _symbol

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
narrow = st.floats(allow_nan=False, allow_infinity=False, width=64)
small_matrices = arrays(
    np.float64, array_shapes(min_dims=2, max_dims=2, max_side=4), elements=narrow
)


# --- soundness: the list of exceptions is empty, and stays so ------------------------------------


def matrices_below_their_norm(seeds, method):
    """The seeds whose bound does not hold."""
    wrong = []
    for seed in seeds:
        W = hard_matrix(seed)
        if method == "gram":
            W = np.pad(W, [(0, 48 - n) for n in W.shape])  # one shape: one compilation
        if not certifies(float(jsn.upper_bound(W, method=method)), W):
            wrong.append(seed)
    return wrong


def test_no_matrix_exceeds_its_bound():
    assert matrices_below_their_norm(range(600), "cholesky") == []


def test_no_matrix_exceeds_its_bound_on_the_device():
    assert matrices_below_their_norm(range(60), "gram") == []


@pytest.mark.slow
@pytest.mark.parametrize("start", range(600, 3000, 400))
def test_no_further_matrix_exceeds_its_bound(start):
    assert matrices_below_their_norm(range(start, start + 400), "cholesky") == []


@pytest.mark.slow
def test_no_further_matrix_exceeds_its_bound_on_the_device():
    assert matrices_below_their_norm(range(60, 560), "gram") == []


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_matrices)
def test_bounds_hold_in_exact_arithmetic(W):
    bound = float(jsn.upper_bound(W))
    assert np.isinf(bound) or exactly_bounds(bound, W)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small_matrices)
def test_bounds_are_close_in_exact_arithmetic(W):
    bound = float(jsn.upper_bound(W))
    if 1e-300 < bound < np.inf:
        assert not exactly_bounds(bound / (1 + 1e-9), W)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_hold_to_sixty_digits(seed):
    W = np.asarray(hard_matrix(12 * 7 * seed + 3), np.float64)[:6, :6]
    W = np.ldexp(W, -oracles.peak_exponent(W)) if W.any() else np.eye(6)
    norm = oracles.mpmath_norm(W)
    assert norm <= float(jsn.upper_bound(W)) <= norm * (1 + 1e-6)


@every_problem
def test_bounds_of_known_matrices_hold_and_are_close(problem):
    bound = jsn.upper_bound(problem.W)
    assert_certified(bound, true_norm(problem.W))
    assert bound <= true_norm(problem.W) * (1 + 1e-6)


@every_problem
def test_bounds_on_the_device_hold(problem):
    bound = jsn.upper_bound(problem.W, method="gram")
    assert_certified(bound, true_norm(problem.W))
    assert bound <= true_norm(problem.W) * 1.005


@pytest.mark.parametrize("shape", [(5000, 3), (3, 5000), (4097, 2), (2048, 5)])
def test_bounds_hold_over_several_slices_of_rows(shape):
    W = np.abs(gaussian(5, *shape))
    assert_certified(jsn.upper_bound(W), true_norm(W))
    assert jsn.upper_bound(W) <= true_norm(W) * (1 + 1e-9)


@pytest.mark.parametrize("n", [170, pytest.param(333, marks=pytest.mark.slow)])
def test_bounds_hold_where_the_largest_eigenvalue_is_an_estimate(n):
    tie = np.linalg.qr(gaussian(n, n, n).astype(float))[0]
    for W in (
        gaussian(n, n, n + 50),
        np.ones((n, n), np.float32),
        tie,
        np.diag(np.arange(n) * 1.0),
    ):
        assert_certified(jsn.upper_bound(W), true_norm(W))
        assert jsn.upper_bound(W) <= true_norm(W) * (1 + 1e-6)


def test_an_estimate_that_falls_short_costs_another_guess_and_no_more():
    W = np.diag(1 - np.linspace(0, 1, 400) ** 8)  # too many large eigenvalues for Lanczos
    estimate = _certify.top(np.asfortranarray(W * W))
    assert estimate < 1 - 1e-7  # below the guesses that are made of it
    assert 1 <= jsn.upper_bound(W) <= 1 + 1e-9


# --- soundness of convolutions -------------------------------------------------------------------


def layers_below_their_norm(seeds, *methods):
    """The seeds and methods whose bound does not hold, and how close the others come."""
    wrong, ratios = [], {method: [] for method in methods}
    for seed in seeds:
        layer = hard_layer(seed)
        norm = np.linalg.norm(dense(layer), 2)
        operator = jsn.Conv(**layer.arguments())
        for method in methods:
            K = layer.K if method != "gram" else layer.K.astype(np.float32)
            bound = jsn.upper_bound(K, operator=operator, method=method)
            ratios[method].append(bound / norm if norm else 1)
            if bound < norm * (1 - (1e-13 if method != "gram" else 1e-6)):
                wrong.append((seed, method))
    return wrong, ratios


def test_no_convolution_exceeds_its_bound():
    wrong, ratios = layers_below_their_norm(range(100), "symbol", "cholesky")
    assert wrong == []
    assert max(ratios["cholesky"]) < 1 + 1e-6  # the dense matrix is exact


def test_small_convolutions_are_bounded_by_their_matrix_unless_told():
    wrong, ratios = layers_below_their_norm(range(10), "auto")
    assert wrong == []
    assert max(ratios["auto"]) < 1 + 1e-6


def test_no_convolution_exceeds_its_bound_on_the_device():
    assert layers_below_their_norm(range(8), "gram")[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 900, 200))
def test_no_further_convolution_exceeds_its_bound(start):
    assert layers_below_their_norm(range(start, start + 200), "symbol", "cholesky")[0] == []


@pytest.mark.slow
def test_no_further_convolution_exceeds_its_bound_on_the_device():
    assert layers_below_their_norm(range(8, 40), "gram")[0] == []


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_circular_convolutions_are_exact(strides, dilation):
    rng = np.random.default_rng(0)
    layer = oracles.Layer(
        rng.standard_normal((3, 3, 3, 4)), (6, 6), strides, "CIRCULAR", (dilation,) * 2, 1, False
    )
    bound = jsn.upper_bound(layer.K, operator=jsn.Conv(**layer.arguments()), method="symbol")
    norm = np.linalg.norm(dense(layer), 2)
    assert_certified(bound, norm)
    assert bound <= norm * (1 + 1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((1, 2), (0, 1))])
def test_bounds_hold_for_the_layers_of_flax(padding, transpose):
    kernel = (3, 2)
    if transpose:
        layer = nn.ConvTranspose(3, kernel, (2, 1), padding, use_bias=False)
    else:
        layer = nn.Conv(3, kernel, (2, 1), padding, kernel_dilation=2, use_bias=False)
    x = jnp.eye(6 * 7 * 2).reshape(-1, 6, 7, 2)
    variables = layer.init(jax.random.key(0), x[:1])
    K = variables["params"]["kernel"]
    norm = np.linalg.norm(np.asarray(layer.apply(variables, x), np.float64).reshape(len(x), -1), 2)
    operator = jsn.Conv((6, 7, 2), (2, 1), padding, 1 if transpose else 2, transpose=transpose)
    for method in ("symbol", "cholesky", "gram"):
        assert_certified(jsn.upper_bound(K, operator=operator, method=method), norm, 1e-6)


def test_the_symbol_does_not_depend_on_the_size_of_the_input():
    K = gaussian(1, 9 * 4, 4).reshape(3, 3, 4, 4)
    bounds = [
        jsn.upper_bound(K, operator=jsn.Conv((n, n, 4)), method="symbol") for n in (1, 5, 32, 9999)
    ]
    assert len(set(bounds)) == 1


def test_large_circles_are_bounded_over_all_frequencies():
    K = gaussian(1, 9 * 4, 4).reshape(3, 3, 4, 4)
    one, all_of_them = (
        jsn.upper_bound(K, operator=jsn.Conv((n, n, 4), padding="CIRCULAR"), method="symbol")
        for n in (32, 1000)
    )
    assert one <= all_of_them <= 1.02 * one


def converged_norm(K, operator):
    """sigma after many steps: at or below the norm."""
    u = jax.random.normal(jax.random.key(0), (8, *operator.codomain(K.shape)))
    step = jax.jit(functools.partial(jsn.power_iterate, operator=operator, n_steps=30))
    return float(step(jnp.asarray(K), u)[0])


LOW_PASS = np.outer([1, 2, 1], [1, 2, 1])[:, :, None, None] / 16


@pytest.mark.parametrize(
    "K",
    [
        gaussian(0, 9 * 8, 8).reshape(3, 3, 8, 8),
        LOW_PASS * gaussian(1, 8, 16).reshape(1, 1, 8, 16),
        np.ones((3, 3, 1, 1), np.float32),
        LOW_PASS * gaussian(2, 8, 8) + 0.1 * gaussian(3, 9 * 8, 8).reshape(3, 3, 8, 8),
    ],
    ids=["gaussian", "low_pass", "ones", "mixed"],
)
def test_three_by_three_convolutions_are_close(K):
    K = np.asarray(K, np.float32)
    operator = jsn.Conv((32, 32, K.shape[2]))
    bound = jsn.upper_bound(K, operator=operator, method="symbol")
    assert bound <= 1.015 * converged_norm(K, operator)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cell_keeps_no_more_of_its_maximum_than_its_proof_assumes(rank):
    # |exp(2i sum w) + 1| = 2 |cos(sum w)|: from the corner of a cell, at 0, to its centre it falls
    # as fast as any symbol of 3 taps can.
    axes, of = [_symbol.Axis(3)] * rank, [16] * rank
    kept = abs(np.exp(2j * rank * 2 * np.pi / 16) + 1) / 2
    fall = _symbol._fall(axes, of, np.ones(rank, bool))
    assert kept * (1 - 1e-12) <= fall <= kept * (1 + 1e-15)


def test_flat_symbols_stay_within_the_budget(monkeypatch):
    K = np.zeros((3, 3, 12, 12), np.float32)
    K[1, 1] = np.eye(12)  # the identity: every frequency is a maximum
    operator = jsn.Conv((64, 64, 12))
    assert 1 <= jsn.upper_bound(K, operator=operator, method="symbol") <= 1.0011
    monkeypatch.setattr("jsn._symbol._BUDGET", 1e8)
    assert 1.0011 < jsn.upper_bound(K, operator=operator, method="symbol") <= 1.2


# --- dtypes, scales, views -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_every_dtype_is_bounded_as_it_is(dtype):
    W = gaussian(0, 20, 12).astype(dtype)
    tiny = np.full((20, 12), ml_dtypes.finfo(dtype).smallest_subnormal, dtype)
    for matrix in (W, tiny):
        for method in ("cholesky", "gram"):
            bound = float(jsn.upper_bound(matrix, method=method))
            assert certifies(bound, matrix)
            norm = true_norm(np.ldexp(matrix.astype(float), 300)) * 2.0**-300
            assert bound <= norm * 1.001 + 5e-324


def test_float64_on_the_device_is_bounded_in_float64():
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(True):
        W = np.eye(4) * (1 + 2.0**-40)
        bound = jsn.upper_bound(jnp.asarray(W), method="gram")
    assert bound.dtype == np.float64
    assert 1 + 2.0**-40 <= bound <= 1 + 2.0**-39


@pytest.mark.parametrize("method", ["cholesky", "gram"])
def test_float64_of_numpy_needs_no_x64(method):
    W = np.array([[1 + 2.0**-40]])
    assert 1 + 2.0**-40 <= jsn.upper_bound(W, method=method) <= 1 + 2.0**-15
    # What float32 cannot hold counts too, entry by entry of a stack, far beyond its range.
    tails = np.full((3, 3), 2.0**-40) + np.diag([1, 0, 0])
    stack = np.stack([tails, 0 * tails, np.ldexp(tails, -900), np.ldexp(tails, 900)], axis=-1)
    bounds = jsn.upper_bound(stack, operator=jsn.Matrix(0, 1, 2), method=method)
    assert bounds[1] == 0
    for i in (0, 2, 3):
        assert exactly_bounds(bounds[i], stack[..., i])
        assert bounds[i] <= np.ldexp(1.0001, (0, 0, -900, 900)[i])


def test_what_float32_cannot_hold_is_bounded_to_rounding():
    W = np.full((16, 16), 1 + 2.0**-24 - 2.0**-44)  # just below a tie: rounds down by the most
    high, rest, shift = _bounds._halved(W, jsn.Matrix())
    assert shift == {(): 1}
    assert (high == 0.5).all()
    off = Fraction(16) * Fraction(W[0, 0] / 2 - 0.5)  # the norm of 16 x 16 equal entries
    assert off <= rest[()] <= off * Fraction(1 + 1e-15) + 16 * Fraction(2) ** -450


@pytest.mark.parametrize("exponent", [-1074, -1060, -1022, -500, 0, 500, 1000])
def test_bounds_scale_with_the_weight(exponent):
    W = np.array([[3.0, 1.0], [1.0, 2.0]])
    bound = float(jsn.upper_bound(np.ldexp(W, exponent)))
    assert exactly_bounds(bound, np.ldexp(W, exponent))
    assert bound <= np.ldexp(3.618033988749895 + 1e-8, exponent) + 2.0**-1073


def test_subnormal_float32_is_not_flushed_on_the_device():
    W = np.full((4, 4), 1e-45, np.float32)
    for method in ("gram", "cholesky"):
        bound = jsn.upper_bound(jnp.asarray(W), method=method)
        assert true_norm(W) <= bound <= true_norm(W) * 1.0001


@pytest.mark.parametrize("method", ["cholesky", "gram"])
def test_zero_weights_have_bound_zero(method):
    assert jsn.upper_bound(np.zeros((3, 4), np.float32), method=method) == 0
    stack = np.stack([np.zeros((3, 4), np.float32), np.ones((3, 4), np.float32)])
    bound = jsn.upper_bound(stack, operator=jsn.Matrix(batch_axis=0), method=method)
    assert bound[0] == 0
    assert_certified(bound[1], np.sqrt(12))


@pytest.mark.parametrize("method", ["symbol", "cholesky", "gram"])
def test_zero_kernels_have_bound_zero(method):
    operator = jsn.Conv((8, 8, 4), feature_group_count=2)
    assert (
        jsn.upper_bound(np.zeros((3, 3, 2, 4), np.float32), operator=operator, method=method) == 0
    )
    K = np.concatenate([np.zeros((3, 3, 2, 2)), np.ones((3, 3, 2, 2))], -1).astype(np.float32)
    assert jsn.upper_bound(K, operator=operator, method=method) >= 16


def test_bounds_beyond_float64_are_infinite():
    assert jsn.upper_bound(np.full((10, 10), 1e308)) == np.inf
    assert np.isfinite(jsn.upper_bound(np.full((10, 10), 1e307)))


@pytest.mark.parametrize("method", ["cholesky", "gram"])
@pytest.mark.parametrize(
    ("operator", "axes"),
    [
        (jsn.Matrix(batch_axis=0), (0, 1, 2, 3)),
        (jsn.Matrix(in_axis=1, out_axis=(0, 3), batch_axis=2), (2, 1, 0, 3)),
        (jsn.Matrix(in_axis=(0, 2), out_axis=None, batch_axis=-1), (3, 0, 2, 1)),
        (jsn.Matrix(batch_axis=(0, 2)), (0, 2, 1, 3)),
    ],
    ids=repr,
)
def test_stacks_have_a_bound_for_each_entry(operator, axes, method):
    W = gaussian(0, 6, 20).reshape(2, 3, 4, 5)
    bounds = jsn.upper_bound(W, operator=operator, method=method)
    batch = operator.batch(W.shape)
    n_in = len(operator.domain(W.shape))
    assert bounds.shape == batch
    assert bounds.dtype == np.float64
    moved = W.transpose(axes)
    for index in np.ndindex(*batch):
        norm = true_norm(moved[index], n_in)
        assert_certified(bounds[index], norm)
        assert bounds[index] <= norm * 1.001


@pytest.mark.parametrize("method", ["symbol", "cholesky", "gram"])
def test_stacks_of_kernels_have_a_bound_for_each(method):
    K = gaussian(0, 9 * 4 * 5, 3).reshape(3, 3, 4, 5, 3)  # the layer axis is last
    operator = jsn.Conv((6, 6, 4)).lifted((4,), 5)
    bounds = jsn.upper_bound(K, operator=operator, method=method)
    alone = [
        jsn.upper_bound(K[..., i].copy(), operator=jsn.Conv((6, 6, 4)), method=method)
        for i in range(3)
    ]
    np.testing.assert_allclose(bounds, alone, rtol=1e-6)


# --- on the device -------------------------------------------------------------------------------


def test_the_gram_bound_is_traced_and_differentiable():
    W = jnp.asarray(gaussian(0, 40, 30))
    bound = lambda W: jsn.upper_bound(W, method="gram")
    value, slope = jax.jit(jax.value_and_grad(bound))(W)
    left, sigma, right = np.linalg.svd(np.asarray(W, np.float64))
    assert value.dtype == jnp.float32
    assert_certified(value, sigma[0])
    np.testing.assert_allclose(slope, np.outer(left[:, 0], right[0]), atol=2e-3)
    stack = jax.jit(jax.vmap(bound))(jnp.stack([W, 2 * W]))
    np.testing.assert_allclose(stack, [value, 2 * value], rtol=1e-5)
    _, tangent = jax.jit(lambda W: jax.jvp(bound, (W,), (W,)))(W)  # homogeneous of degree 1
    np.testing.assert_allclose(tangent, value, rtol=1e-3)


def test_the_traced_gram_bound_covers_every_scale():
    bound = jax.jit(lambda W: jsn.upper_bound(W, method="gram"))
    for scale in (1e-45, 1e-38, 1e-20, 1e20, 1e37):
        W = np.float32(scale) * np.ones((2, 3), np.float32)
        assert_certified(bound(W), true_norm(W))
    assert bound(jnp.zeros((2, 3))) == 0
    assert bound(jnp.full((2, 3), 3e38, jnp.float32)) == np.inf
    assert np.isnan(bound(jnp.array([[1.0, jnp.nan]])))
    slope = jax.jit(jax.grad(lambda W: jsn.upper_bound(W, method="gram")))
    assert np.isfinite(slope(jnp.zeros((2, 3)))).all()
    np.testing.assert_allclose(slope(1e-30 * jnp.eye(2, 3))[0, 0], 0.5, atol=0.5)


def test_the_gram_bound_of_a_convolution_is_traced():
    K = jnp.asarray(gaussian(0, 9 * 4, 6).reshape(3, 3, 4, 6))
    operator = jsn.Conv((8, 8, 4))
    traced = jax.jit(lambda K: jsn.upper_bound(K, operator=operator, method="gram"))(K)
    np.testing.assert_allclose(traced, jsn.upper_bound(K, operator=operator, method="gram"), 1e-5)
    assert_certified(traced, jsn.upper_bound(K, operator=operator) / (1 + 1e-6))


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_weights_are_bounded_where_they_are(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    stack = gaussian(0, 4 * 16, 8).reshape(4, 16, 8)
    W = jax.device_put(stack, NamedSharding(mesh, PartitionSpec("a", None, "b")))
    M = jax.device_put(stack[0], NamedSharding(mesh, PartitionSpec("a", "b")))
    for method in ("cholesky", "gram"):
        bounds = jsn.upper_bound(W, operator=jsn.Matrix(batch_axis=0), method=method)
        assert_certified(bounds, [true_norm(one) for one in stack])
        assert_certified(jsn.upper_bound(M, method=method), true_norm(stack[0]))
    with jax.set_mesh(mesh):
        slope = jax.jit(jax.grad(lambda W: jsn.upper_bound(W, method="gram")))(M)
    assert slope.shape == M.shape


@pytest.mark.parametrize("explicit", [False, True])
def test_a_sharded_weight_is_gathered_along_its_smaller_side_only(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    gathered = {}
    for spec in (PartitionSpec("a"), PartitionSpec("a", "b")):
        W = jax.device_put(gaussian(0, 512, 64), NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            compiled = jax.jit(lambda W: jsn.upper_bound(W, method="gram")).lower(W).compile()
        gathered[spec] = set(re.findall(r"= (\S+?)\{\S* all-gather\(", compiled.as_text()))
    assert gathered == {PartitionSpec("a"): set(), PartitionSpec("a", "b"): {"f32[128,64]"}}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cholesky", "gram"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite_raise(wrong, method):
    W = gaussian(0, 4, 3)
    W[2, 1] = wrong
    with pytest.raises(ValueError, match=rf"1 of 12 entries not finite.*\(2, 1\), is {wrong}"):
        jsn.upper_bound(W, method=method)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), ()])
def test_empty_and_flat_weights_raise(shape):
    with pytest.raises(ValueError, match="cannot be viewed as asked"):
        jsn.upper_bound(np.zeros(shape, np.float32))


@pytest.mark.parametrize("W", [np.ones((2, 2), np.int32), np.ones((2, 2), complex), [[1.0]]])
def test_weights_that_are_no_real_arrays_raise(W):
    with pytest.raises(TypeError, match="real floating point"):
        jsn.upper_bound(W)


@pytest.mark.skipif(np.finfo(np.longdouble).bits == 64, reason="long double is float64 here")
def test_wider_dtypes_raise():
    with pytest.raises(TypeError, match="more digits"):
        jsn.upper_bound(np.ones((2, 2), np.longdouble))


def test_methods_that_do_not_fit_raise():
    W = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"'symbol', operator Matrix\(\).*'cholesky'"):
        jsn.upper_bound(W, method="symbol")
    with pytest.raises(ValueError, match="method is 'svd'"):
        jsn.upper_bound(W, method="svd")
    with pytest.raises(TypeError, match="no bound is known"):
        jsn.upper_bound(W, operator="conv")


@pytest.mark.parametrize("method", ["auto", "cholesky"])
def test_traced_weights_raise_outside_gram(method):
    with pytest.raises(TypeError, match="W is traced"):
        jax.jit(lambda W: jsn.upper_bound(W, method=method))(jnp.ones((2, 2)))


def test_weights_of_other_processes_raise(monkeypatch):
    class Elsewhere:
        is_fully_addressable = False
        shape, ndim, dtype, size = (2, 2), 2, np.dtype(np.float32), 4

    with pytest.raises(ValueError, match="only a part of the weight"):
        jsn.upper_bound(Elsewhere())


def test_tpus_raise(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="not proven on a TPU"):
        jax.jit(lambda W: jsn.upper_bound(W, method="gram"))(jnp.ones((2, 2)))


def test_inner_products_too_long_for_a_proof_raise():
    long = jax.ShapeDtypeStruct((2**23, 1), np.float32)
    with pytest.raises(ValueError, match="has no error bound"):
        jax.eval_shape(lambda W: jsn.upper_bound(W, method="gram"), long)


def test_processors_that_flush_subnormal_numbers_raise(monkeypatch):
    # A stand-in for the mode: numpy.ones is what the check computes with.
    monkeypatch.setattr(_rounding.np, "ones", np.zeros)
    with pytest.raises(FloatingPointError, match="subnormal numbers are flushed"):
        jsn.upper_bound(np.eye(2))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other codes of modes")
@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00], ids=["down", "up", "to_zero"])
def test_processors_that_do_not_round_to_nearest_raise(mode):
    library = ctypes.CDLL(None)
    try:
        assert library.fesetround(mode) == 0
        with pytest.raises(FloatingPointError, match="not rounded to nearest"):
            jsn.upper_bound(np.eye(2))
    finally:
        library.fesetround(0)
