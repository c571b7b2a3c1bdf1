"""Station 3: power_iterate alone. Truth, derivative, scale, lost and broken input, cost."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from matrices import PROBLEMS, assert_converged, gaussian, named, true_norm, with_spectrum

import jsn
from jsn import _block, _power

X64 = jax.config.jax_enable_x64
STACK = jsn.Matrix(batch_axis=0)

# Compiled as a whole, and nearly always for the same shapes: compiling is what takes the time.
iterate = jax.jit(jsn.power_iterate, static_argnames=("n_steps", "operator"))


@functools.partial(jax.jit, static_argnames=("n_steps", "operator"))
def with_gradient(W, u, n_steps=1, operator=None):
    total = lambda W: jnp.sum(jsn.power_iterate(W, u, n_steps, operator=operator)[0])
    return jax.value_and_grad(total)(W)


@jax.jit
def history(W, u):
    """The block after sixty steps, and every sigma on the way."""

    def step(u, _):
        sigma, u = jsn.power_iterate(W, u)
        return u, sigma

    return jax.lax.scan(step, u, None, 60)


N = 96
SMALL = [problem for problem in PROBLEMS if max(problem.W.shape) <= N]


def padded(problem):
    """A problem among zeros, which change no singular value."""
    W = np.zeros((N, N), np.float32)
    W[tuple(slice(k) for k in problem.W.shape)] = problem.W
    return jnp.asarray(W)


def rows(seed, *shape):
    """Random vectors of the output side."""
    return jnp.asarray(gaussian(seed, *shape))


def orthonormal_rows(seed, *shape):
    """Random orthonormal vectors of the output side."""
    return jnp.asarray(np.linalg.qr(gaussian(seed, *shape).T)[0].T)


def each(problems):
    return pytest.mark.parametrize("problem", problems, ids=lambda problem: problem.name)


# --- truth ----------------------------------------------------------------------------------


@each(SMALL)
@pytest.mark.parametrize("block", [1, 16])
def test_sigma_is_never_above_the_truth(problem, block):
    _, sigmas = history(padded(problem), rows(1, block, N))
    assert np.all(np.asarray(sigmas, np.float64) <= true_norm(problem.W) * (1 + 1e-6))


@each(SMALL)
def test_sixteen_vectors_find_the_norm_from_any_start(problem):
    _, sigmas = history(padded(problem), 10 * rows(2, 16, N))
    assert_converged(sigmas[-1], true_norm(problem.W), rtol=1e-5)


def test_more_vectors_are_truer():
    W, u = padded(named("no_gap")), rows(3, 16, N)
    errors = [1 - float(history(W, u[:block])[1][5]) for block in (1, 16)]
    assert errors[1] < errors[0] / 4


@each([p for p in SMALL if p.tag in ("gap", "no_gap", "near_tie", "gaussian", "ill_scaled")])
def test_the_rows_of_u_are_orthonormal_after_a_step(problem):
    for start in (rows(4, 16, N), 1e3 * rows(5, 16, N), 1e-3 * rows(6, 16, N)):
        _, u = iterate(padded(problem), start)
        u = np.asarray(u, np.float64)
        assert np.allclose(u @ u.T, np.eye(16), atol=5e-6)  # Cholesky's shift is 4e-6


def test_a_block_of_the_whole_side_is_exact_at_once():
    W = gaussian(7, 40, 8)
    for weight, u in ((W, rows(8, 8, 8)), (W.T, rows(9, 8, 40))):
        assert_converged(iterate(weight, u, 2)[0], true_norm(W), rtol=1e-6)


def test_a_block_may_be_larger_than_the_input_side():
    W = gaussian(10, 3, 10)
    sigma, u = iterate(W, rows(11, 7, 10), 3)
    assert u.shape == (7, 10)
    assert np.allclose(u @ u.T, np.eye(7), atol=5e-6)
    assert_converged(sigma, true_norm(W), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_a_single_row_or_column(shape):
    W = gaussian(12, *shape)
    sigma, u = iterate(W, jnp.ones(shape[1]))
    assert_converged(sigma, np.linalg.norm(W.astype(np.float64)), rtol=1e-6)
    assert u.shape == (shape[1],)


# --- block_size=1 is Miyato's iteration -----------------------------------------------------


def miyato(W, u, n_steps):
    """Algorithm 1 of arXiv:1802.05957 in float64, W as (inputs, outputs): v first, then u."""
    W, u = np.asarray(W, np.float64), np.asarray(u, np.float64)
    for _ in range(n_steps):
        v = W @ u / np.linalg.norm(W @ u)
        u = v @ W / np.linalg.norm(v @ W)
    return v @ W @ u, u


@pytest.mark.parametrize("n_steps", [1, 5])
@pytest.mark.parametrize("name", ["gap", "no_gap", "decaying", "rank_one", "tiny", "huge"])
def test_one_vector_is_miyatos_iteration(name, n_steps):
    W, u = padded(named(name)), rows(13, N)
    sigma, new = iterate(W, u, n_steps)
    expected_sigma, expected = miyato(W, u, n_steps)
    assert np.isclose(sigma, expected_sigma, rtol=1e-6, atol=0)
    assert np.allclose(new, expected, atol=1e-6)


def test_a_vector_and_a_block_of_one_are_the_same():
    W, u = padded(named("gap")), rows(14, 1, N)
    sigma, vector = iterate(W, u[0], 5)
    block_sigma, block = iterate(W, u, 5)
    assert (vector.shape, block.shape) == ((N,), (1, N))
    assert np.array_equal(sigma, block_sigma)
    assert np.array_equal(vector, block[0])


# --- no step --------------------------------------------------------------------------------


def test_no_step_reads_the_best_of_the_stored_block_and_keeps_it():
    W, u = padded(named("no_gap")), orthonormal_rows(15, 16, N)
    sigma, same = iterate(W, u, 0)
    assert_converged(sigma, true_norm(np.asarray(W, np.float64) @ u.T), rtol=1e-6)
    assert np.array_equal(same, u)
    sigma, same = iterate(W, u[2], 0)
    assert_converged(sigma, np.linalg.norm(np.asarray(W, np.float64) @ u[2]), rtol=1e-6)
    assert np.array_equal(same, u[2])


def test_no_step_is_not_above_the_truth_even_where_rows_are_not_orthonormal():
    W = padded(named("gap"))
    for seed in range(5):
        u = 10 * rows(seed, 16, N)
        sigma, _ = iterate(W, u.at[1].set(u[0]), 0)
        assert 0 < sigma <= 3.0 * (1 + 1e-6)


# --- derivative -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n_steps", "block"), [(0, 16), (1, 16), (5, 16), (1, None)])
def test_the_gradient_is_u_v_transposed(n_steps, block):
    W = padded(named("gap"))
    left, s, right = np.linalg.svd(np.asarray(W, np.float64))
    u, _ = history(W, rows(16, block or 1, N))
    sigma, gradient = with_gradient(W, u if block else u[0], n_steps)
    assert_converged(sigma, s[0], rtol=1e-6)
    assert np.allclose(gradient, np.outer(left[:, 0], right[0]), atol=5e-6)


def test_the_derivative_is_that_of_the_true_norm():
    W = np.asarray(padded(named("decaying")), np.float64)
    dW, step = gaussian(17, N, N).astype(np.float64), 1e-6
    exact = (true_norm(W + step * dW) - true_norm(W - step * dW)) / (2 * step)
    W, direction = jnp.asarray(W, jnp.float32), jnp.asarray(dW, jnp.float32)
    u, _ = history(W, rows(18, 16, N))
    _, forward = jax.jvp(lambda W: iterate(W, u)[0], (W,), (direction,))
    backward = np.sum(np.asarray(with_gradient(W, u)[1], np.float64) * dW)
    assert np.isclose(forward, exact, rtol=1e-5)
    assert np.isclose(backward, exact, rtol=1e-5)


def test_the_gradient_of_each_matrix_of_a_stack_is_its_own():
    W = np.stack([padded(named("gap")), 5 * padded(named("gap"))[::-1]])
    u = jnp.stack([history(w, rows(19, 16, N))[0] for w in W])
    left, _, right = np.linalg.svd(W.astype(np.float64))
    sigma, gradient = with_gradient(W, u, operator=STACK)
    assert np.isclose(sigma, 3 + 15, rtol=1e-6)
    assert np.allclose(gradient, left[:, :, :1] * right[:, :1, :], atol=5e-6)


@pytest.mark.parametrize("n_steps", [0, 1, 5])
def test_u_carries_no_gradient(n_steps):
    def everything(W, u):
        sigma, new = jsn.power_iterate(W, u, n_steps)
        return sigma, jnp.sum(new**3)

    W, u = padded(named("gap")), rows(20, 16, N)
    of_W, of_u = jax.jit(jax.jacrev(everything, argnums=(0, 1)))(W, u)[0]
    through_W, _ = jax.jit(jax.jacrev(everything, argnums=(0, 1)))(W, u)[1]
    assert np.any(of_W)
    assert not np.any(of_u)
    assert not np.any(through_W)


# --- scale ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 16])
# At -100 an entry of W^T u is subnormal.
@pytest.mark.parametrize("exponent", [-90, -40, 40, 100, 118])
def test_a_power_of_two_scales_sigma_and_changes_nothing_else(block, exponent):
    W, u = padded(named("gaussian_small")), rows(21, block, N)
    sigma, new = iterate(W, u, 5)
    scaled_sigma, scaled_new = iterate(W * 2.0**exponent, u, 5)
    assert float(scaled_sigma) == float(sigma) * 2.0**exponent
    assert np.array_equal(new, scaled_new)


@pytest.mark.parametrize("exponent", [-90, 0, 118])
def test_platforms_that_do_not_branch_give_the_same(monkeypatch, exponent):
    W, u = padded(named("gaussian_small")) * 2.0**exponent, rows(21, 16, N)
    sigma, new = jsn.power_iterate(W, u, 3)
    choose = _power.lax.platform_dependent

    def elsewhere(*args, default, **others):
        if default.__name__ == "elsewhere":
            return default(*args)
        return choose(*args, default=default, **others)  # not what only a GPU can run fast

    monkeypatch.setattr(_power.lax, "platform_dependent", elsewhere)
    same_sigma, same_new = jsn.power_iterate(W, u, 3)
    assert np.isclose(float(same_sigma), float(sigma), rtol=1e-6, atol=0)
    assert np.allclose(same_new, new, atol=1e-4)


def test_weights_of_any_scales_side_by_side_do_not_touch_each_other():
    """Whatever it takes to square the far ones, the others come out as they do alone."""
    W = padded(named("gaussian_small"))

    def normalized(*scales):
        params = {f"layer_{i}": {"kernel": W * np.float32(s)} for i, s in enumerate(scales)}
        state = jsn.init(params, block_size=16, warmup=2)
        return [entry["kernel"] for entry in jsn.normalize(params, state)[0].values()]

    usual, small, large, zero = normalized(1, 2.0**-100, 2.0**100, 0)
    alike = normalized(1, 1, 1, 1)
    assert np.array_equal(usual, alike[0])
    assert np.allclose([small, large], alike[1], rtol=1e-5, atol=1e-7)
    assert not np.any(zero)


@pytest.mark.parametrize("n_steps", [0, 1])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_any_scale_scales_sigma_and_not_its_gradient(n_steps, scale):
    W, u = padded(named("gaussian_small")), orthonormal_rows(22, 16, N)
    sigma, gradient = with_gradient(W, u, n_steps)
    scaled_sigma, scaled_gradient = with_gradient(np.float32(scale) * W, u, n_steps)
    assert np.isclose(float(scaled_sigma), scale * float(sigma), rtol=1e-6, atol=0)
    assert np.allclose(gradient, scaled_gradient, atol=1e-6)


# --- zero, NaN, infinity, and blocks that are lost ------------------------------------------


@pytest.mark.parametrize("n_steps", [0, 1, 5])
def test_zero_gives_zero_and_a_usable_u(n_steps):
    for start in (rows(23, 16, N), rows(24, N)):
        sigma, u = iterate(jnp.zeros((N, N)), start, n_steps)
        assert sigma == 0
        assert np.all(np.isfinite(u))
    sigma, gradient = with_gradient(jnp.zeros((N, N)), start, n_steps)
    assert sigma == 0
    assert np.all(np.isfinite(gradient))


def test_after_a_thousand_zero_steps_u_still_finds_the_norm():
    W = padded(named("gap"))
    u = functools.reduce(lambda u, _: history(jnp.zeros((N, N)), u)[0], range(17), rows(25, 16, N))
    _, sigmas = history(W, u)
    assert_converged(sigmas[19], true_norm(W), rtol=1e-3)


@pytest.mark.parametrize("n_steps", [0, 1, 5])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_gives_nan_and_leaves_u_alone(n_steps, bad):
    W = padded(named("gap")).at[3, 4].set(bad)
    u = orthonormal_rows(26, 16, N)
    for start in (u, u[0]):
        sigma, new = iterate(W, start, n_steps)
        assert np.isnan(sigma)
        assert np.allclose(new, start, rtol=4e-6)  # Cholesky's shift is 4e-6


def test_a_stack_keeps_what_is_broken_to_itself():
    W = jnp.stack([padded(named(name)) for name in ("gap", "no_gap", "decaying")])
    broken = W.at[1, 2, 3].set(np.nan)
    u = rows(27, 3, 16, N)
    sigma, new = iterate(W, u, operator=STACK)
    other_sigma, other_new = iterate(broken, u, operator=STACK)
    assert np.isnan(other_sigma[1])
    assert np.all(np.isfinite(other_new))
    for index in (0, 2):
        assert np.array_equal(sigma[index], other_sigma[index])
        assert np.array_equal(new[index], other_new[index])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entries_of_u_that_are_not_finite_are_replaced(bad):
    W = padded(named("gap"))
    for start in (rows(28, 16, N).at[2, 3].set(bad), jnp.full((16, N), bad)):
        u, sigmas = history(W, start)
        assert np.all(np.isfinite(u))
        assert_converged(sigmas[19], true_norm(W), rtol=1e-3)


@each([problem for problem in SMALL if problem.sigma and problem.W.shape[1] <= 64])
def test_a_lost_block_is_back_within_twenty_steps(problem):
    """u^T A = 0 although A is not: u lies on outputs that A never reaches."""
    W, u = padded(problem), jnp.eye(N)[-16:]
    assert iterate(W, u, 0)[0] == 0
    _, sigmas = history(W, u)
    assert_converged(sigmas[19], true_norm(problem.W), rtol=1e-3)


def test_a_lost_vector_comes_back():
    W = np.zeros((N, N), np.float32)
    W[:, :10] = with_spectrum(29, N, 10, [1.0, *np.linspace(0.5, 0.1, 9)])
    _, sigmas = history(W, jnp.eye(N)[20:21])
    assert sigmas[0] == 0
    assert_converged(sigmas[19], 1.0, rtol=1e-3)


def test_a_stack_may_lose_one_of_its_blocks():
    W = jnp.stack([padded(named("gap")), padded(named("decaying")), jnp.zeros((N, N))])
    u = jnp.stack([jnp.eye(N)[-16:], orthonormal_rows(30, 16, N), jnp.eye(N)[:16]])
    for _ in range(4):
        sigma, u = iterate(W, u, 5, operator=STACK)
    assert_converged(sigma, [3.0, 5.0, 0.0], rtol=1e-3)


# --- under transformations, in any dtype ----------------------------------------------------


def test_eager_jit_vmap_and_a_stack_agree():
    W = jnp.stack([padded(named(name)) for name in ("gap", "no_gap", "decaying")])
    u = rows(31, 3, 16, N)
    expected, blocks = iterate(W, u, operator=STACK)
    assert (expected.shape, blocks.shape) == ((3,), u.shape)
    sigma = jnp.stack([iterate(w, x)[0] for w, x in zip(W, u, strict=True)])
    assert np.allclose(sigma, expected, rtol=1e-6)
    assert np.isclose(jsn.power_iterate(W[0], u[0])[0], expected[0], rtol=1e-6)
    sigma, new = jax.vmap(iterate)(W, u)
    assert np.allclose(sigma, expected, rtol=1e-6)
    assert np.allclose(new, blocks, atol=1e-3)  # near ties may turn vectors a little
    sigma, new = jax.vmap(lambda x: iterate(W[0], x))(u)
    assert np.isclose(sigma[0], expected[0], rtol=1e-6)
    assert new.shape == u.shape


def test_several_steps_in_one_call_are_several_calls():
    W, u = padded(named("gap")), rows(32, 16, N)
    for _ in range(5):
        expected, u = iterate(W, u)
    sigma, _ = iterate(W, rows(32, 16, N), 5)
    assert np.isclose(sigma, expected, rtol=1e-6)
    assert np.isclose(sigma, history(W, rows(32, 16, N))[1][4], rtol=1e-6)


def test_grad_through_a_scan():
    W, u = padded(named("gap")), rows(33, 16, N)
    gradient = jax.jit(jax.grad(lambda W: jnp.mean(history(W, u)[1][-10:])))(W)
    settled, _ = history(W, u)
    assert np.allclose(gradient, with_gradient(W, settled)[1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *(["float64"] if X64 else [])])
def test_u_comes_back_as_it_came_in(dtype):
    W = padded(named("gap"))
    for u in (rows(34, 16, N).astype(dtype), rows(35, N).astype(dtype)):
        sigma, new = iterate(W, u)
        assert (new.shape, new.dtype) == (u.shape, u.dtype)
        assert sigma.dtype == jnp.float32
        expected, _ = iterate(W, u.astype(jnp.float32))
        assert np.isclose(sigma, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_computed_with_in_float32(dtype):
    W, u = padded(named("gap")).astype(dtype), rows(36, 16, N)
    sigma, new = iterate(W, u)
    expected_sigma, expected = iterate(W.astype(jnp.float32), u)
    assert sigma.dtype == new.dtype == jnp.float32
    assert np.array_equal(sigma, expected_sigma)
    assert np.array_equal(new, expected)
    assert with_gradient(W, u)[1].dtype == W.dtype


@pytest.mark.skipif(not X64, reason="float64 needs JAX_ENABLE_X64=1")
def test_float64_weights_give_float64_sigma_and_float32_u():
    W = np.asarray(padded(named("gap")), np.float64) * 1e100
    u = rows(37, 16, N)
    for _ in range(12):
        sigma, u = iterate(W, u, 5)
    assert (sigma.dtype, u.dtype) == (jnp.float64, jnp.float32)
    assert np.isclose(sigma, true_norm(W), rtol=1e-10, atol=0)


def test_numpy_arrays_are_weights_too():
    W, u = gaussian(38, 6, 8), gaussian(39, 2, 8)
    for n_steps in (0, np.int64(2)):
        sigma, new = jsn.power_iterate(W, u, n_steps)
        expected_sigma, expected = jsn.power_iterate(jnp.asarray(W), jnp.asarray(u), n_steps)
        assert isinstance(new, jax.Array)
        assert np.array_equal(sigma, expected_sigma)
        assert np.array_equal(new, expected)


# --- cost -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 8, 16])
def test_a_step_reads_the_weight_twice_whatever_the_block(block):
    W, u = jnp.ones((31, 37)), rows(40, block, 37)
    reads = functools.partial(jaxprs.reads, size=31 * 37)
    sigma = lambda n: lambda W, u: jsn.power_iterate(W, u, n)[0]
    assert reads(sigma(0), W, u) == 1
    assert reads(sigma(1), W, u) == 2
    assert reads(sigma(5), W, u) == 10
    assert reads(jax.value_and_grad(sigma(0)), W, u) == 1  # the derivative reads nothing
    assert reads(jax.value_and_grad(sigma(1)), W, u) == 2


def test_a_cpu_that_is_one_device_calls_lapack_for_all_matrices_at_once(monkeypatch):
    eigh, shapes = _block._eigh, set()
    monkeypatch.setattr(_block, "_eigh", lambda grams: shapes.add(grams.shape) or eigh(grams))
    grams = jnp.asarray(gaussian(0, 5, 4, 4))
    grams @= jnp.swapaxes(grams, 1, 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    values, vectors = _block._eigh_on_cpu(grams)
    regular = grams + _block.identity(grams)
    inverses = _block._factorized_on_cpu(regular)
    assert shapes == {(4, 4)}  # one matrix after another
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    at_once, same = _block._eigh_on_cpu(grams)
    assert shapes == {(4, 4), (5, 4, 4)}
    np.testing.assert_allclose(at_once, values, rtol=1e-5)
    np.testing.assert_allclose(np.abs(same), np.abs(vectors), atol=1e-4)
    np.testing.assert_allclose(_block._factorized_on_cpu(regular), inverses, atol=1e-5)


def test_no_eigendecomposition_is_as_large_as_a_large_block():
    W = jnp.ones((90, 80))
    for block, largest in ((16, 16), (32, 8), (48, 8), (80, 80)):  # of 80: a whole side is exact
        equations = jaxprs.trace(lambda W, u: jsn.power_iterate(W, u, 2), W, rows(42, block, 80))
        sides = [x.invars[0].aval.shape[-1] for x in equations if x.primitive.name == "eigh"]
        assert max(sides) == largest


def test_nothing_of_the_size_of_a_block_is_baked_into_the_program():
    W, u = jnp.ones((31, 37)), rows(41, 8, 37)
    small = 2 * 8**2  # what mixes the vectors of a block
    assert jaxprs.largest_constant(lambda W, u: jsn.power_iterate(W, u, 3), W, u) <= small
    assert jaxprs.largest_constant(lambda W: W @ u.T, W) == 8 * 37  # the count can fail


@pytest.mark.parametrize("block", range(2, 70))
def test_a_block_is_in_thirds_until_it_has_eight_residuals_and_previous_directions(block):
    n_ritz, n_residual, n_previous = _block.shares(block)
    assert n_ritz + n_residual + n_previous == block
    assert n_ritz >= n_residual >= n_previous
    assert n_residual == min(round(block / 3), 8)


@pytest.mark.parametrize("n_vectors", [2, 17, 24, 33, 60])
def test_the_first_block_spans_as_many_directions_as_it_has_vectors(n_vectors):
    for length in (n_vectors, n_vectors + 1, 2 * n_vectors):
        values = np.linalg.svd(_block.probe((n_vectors, length), 0), compute_uv=False)
        assert values[-1] > 1e-4 * values[0]


@pytest.mark.parametrize("devices", [False, True], ids=["one device", "several"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("block", [1, 5, 16, 32])
def test_what_is_not_finite_makes_all_of_a_block_nan(block, value, devices, monkeypatch):
    """So that an entry of the next block says whether to keep the last one."""
    monkeypatch.setattr(_block, "_lapack_hangs", lambda: devices)
    grams = np.tile(np.eye(block, dtype=np.float32) + 0.01, (block, 1, 1))
    for i in range(block):
        grams[i, i, block // 2] = grams[i, block // 2, i] = value
    changes = jax.jit(lambda x: _block.orthonormalizer(x))(grams)
    assert np.all(np.isnan(changes))


# --- the leading Ritz pairs of a large block ---------------------------------------------------

SPECTRA = {
    "flat": np.linspace(1, 0.9, 32),
    "ties": np.repeat([1.0, 0.99, 0.5, 0.1], 8),
    "geometric": 0.3 ** np.arange(32),
    "one": np.r_[1, np.zeros(31)],
    "few": np.r_[np.linspace(1, 0.5, 5), np.full(27, 1e-7)],
}


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_leading_ritz_pairs_of_a_large_block(spectrum, scale):
    """From blocks whose first vectors are close to the last Ritz vectors, as they come."""
    rng, values = np.random.default_rng(50), SPECTRA[spectrum]
    turns = [np.linalg.qr(np.eye(32) + 0.05 * rng.standard_normal((32, 32)))[0] for _ in range(3)]
    grams = np.stack([(Q * values) @ Q.T for Q in turns])
    n_ritz, n_residual, _ = _block.shares(32)
    found = _block.leading(jnp.asarray(scale * grams, jnp.float32))
    vectors = np.asarray(found.vectors, np.float64)
    assert vectors.shape == (3, n_ritz, 32)
    identity = np.broadcast_to(np.eye(n_ritz), (3, n_ritz, n_ritz))
    np.testing.assert_allclose(vectors @ vectors.swapaxes(1, 2), identity, atol=1e-4)
    first = vectors[:, :n_residual]
    np.testing.assert_allclose(first @ first.swapaxes(1, 2), identity[:, :8, :8], atol=1e-4)
    seen = first @ grams @ first.swapaxes(1, 2)  # diagonal, with the values on it
    scales = scale * np.float64(found.shrink)[:, None] ** 2
    expected = np.stack([np.diag(each) for each in found.values / scales])
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    assert np.all(found.values[:, :1] / scales > 1 - 1e-3)
    assert np.all(found.values[:, :1] / scales < 1 + 1e-6)


@pytest.mark.parametrize("place", [0, 7, 8, 12, 16, 20, 31])
def test_the_largest_is_found_wherever_in_a_block_it_hides(place):
    """Also where no product leads to it from the vectors in front."""
    values = np.full(32, 0.5)
    values[place] = 1
    found = _block.leading(jnp.asarray(np.diag(values)[None], jnp.float32))
    assert found.values[0, 0] > 1 - 1e-3
    assert np.argmax(np.abs(found.vectors[0, 0])) == place


def test_zero_and_nan_leave_a_large_block_as_it_was():
    grams = jnp.stack([jnp.zeros((32, 32)), jnp.full((32, 32), jnp.nan), jnp.eye(32)])
    found = _block.leading(grams)
    front = np.eye(16, 32)
    assert np.array_equal(found.values[0], np.zeros(8))
    assert np.all(np.isnan(found.values[1]))
    for i in (0, 2):
        assert np.all(np.linalg.norm(found.vectors[i] @ front.T, axis=-1) > 0.9)
