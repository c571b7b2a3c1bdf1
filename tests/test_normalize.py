"""Station 6: init, normalize, sigmas, fold on trees. The norms are true, whatever happens."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from matrices import PROBLEMS, assert_converged, gaussian, named, true_norm, with_spectrum

import jsn
from jsn import Matrix

X64 = jax.config.jax_enable_x64

# Compiled as a whole: eagerly, each small operation is compiled alone, which takes longer.
normalize = jax.jit(jsn.normalize, static_argnames=("n_steps", "soft"))
sigmas = jax.jit(jsn.sigmas, static_argnames=("n_steps",))
fold = jax.jit(jsn.fold, static_argnames=("n_steps", "soft"))

FOUR = {
    "a": {"kernel": jnp.asarray(gaussian(1, 3, 3, 4, 40))},
    "b": {"kernel": jnp.asarray(gaussian(2, 36, 40))},
    "c": {"kernel": jnp.asarray(gaussian(3, 30, 8))},
    "d": {"kernel": jnp.asarray(gaussian(4, 10, 1))},
}
TABLE = {problem.name: {"kernel": jnp.asarray(problem.W)} for problem in PROBLEMS}
each = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def advanced(params, state, steps):
    """The state after some steps on the same parameters."""
    for _ in range(steps):
        _, state = normalize(params, state)
    return state


@pytest.fixture(scope="module")
def state():
    """The state that the whole table starts from."""
    return jsn.init(TABLE)


@pytest.fixture(scope="module")
def zero_state():
    """A state that has only ever seen weights of zero."""
    zero = jax.tree.map(jnp.zeros_like, TABLE)
    return advanced(zero, jsn.init(zero), 20)


def finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def assert_normalized(weight, rtol, bound=1.0):
    """The true norm is the bound: never below it but for rounding, above by `rtol` at most."""
    assert -1e-6 <= true_norm(weight) / bound - 1 <= rtol


# --- the norms are true ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_sigmas(state):
    return sigmas(TABLE, state)


@each
def test_sigma_is_true_after_init(problem, first_sigmas):
    assert_converged(first_sigmas[problem.name]["kernel"], true_norm(problem.W), rtol=1e-3)


@pytest.fixture(scope="module")
def first(state):
    return normalize(TABLE, state)[0]


@each
def test_the_first_normalize_gives_each_weight_its_bound(problem, first):
    weight = first[problem.name]["kernel"]
    if problem.sigma == 0:
        assert not np.any(weight)
    else:
        assert_normalized(weight, rtol=2e-3)


@pytest.fixture(scope="module")
def settled(state):
    return normalize(TABLE, advanced(TABLE, state, 100))


@each
def test_a_hundred_static_steps_give_each_weight_its_bound(problem, settled):
    weight = settled[0][problem.name]["kernel"]
    if problem.sigma == 0:
        assert not np.any(weight)
    else:
        assert_normalized(weight, rtol=1e-5)


@each
def test_sigma_is_never_above_the_truth(problem, first_sigmas, settled):
    stored = sigmas(TABLE, settled[1])
    for found in (first_sigmas, stored):
        assert_converged(found[problem.name]["kernel"], true_norm(problem.W), rtol=1e-3)


def test_large_gaussians_are_true_after_init():
    shapes = [(512, 512)] * 3 + [(1000, 200), (200, 1000)]
    params = {str(seed): {"kernel": gaussian(seed, *shape)} for seed, shape in enumerate(shapes)}
    for name, sigma in sigmas(params, jsn.init(params)).items():
        assert_converged(sigma["kernel"], true_norm(params[name]["kernel"]), rtol=1e-3)


@pytest.mark.parametrize("block_size", [1, 5])
def test_a_small_block_starts_as_true_as_a_large_one(block_size):
    params = {"kernel": gaussian(0, 128, 128)}
    state = jsn.init(params, block_size=block_size)
    assert state.u["kernel"].shape == (block_size, 128)
    assert_converged(sigmas(params, state)["kernel"], true_norm(params["kernel"]), rtol=2e-3)


def test_fold_is_truer_than_one_step():
    params = {"kernel": named("no_gap").W, "bias": jnp.ones(48)}
    state = jsn.init(params, block_size=4, warmup=0)
    errors = [
        true_norm(normalize(params, state)[0]["kernel"]) - 1,
        true_norm(fold(params, state)["kernel"]) - 1,
        true_norm(fold(params, state, n_steps=100)["kernel"]) - 1,
    ]
    assert errors[1] < errors[0] / 3
    assert errors[2] < 1e-5
    assert np.array_equal(fold(params, state)["bias"], params["bias"])


# --- block_size=1 is Miyato's iteration -----------------------------------------------------


def test_one_vector_follows_miyato_through_a_training_run():
    rng = np.random.default_rng(1)
    W = with_spectrum(2, 30, 20, np.linspace(1.0, 0.5, 20))
    state = jsn.init({"kernel": W}, block_size=1, warmup=0)
    u = np.asarray(state.u["kernel"][0], np.float64)
    for _ in range(20):
        W = (W + 0.02 * rng.standard_normal(W.shape)).astype(np.float32)
        normalized, state = normalize({"kernel": W}, state)
        v = W.astype(np.float64) @ u
        v /= np.linalg.norm(v)
        u = v @ W
        sigma = np.linalg.norm(u)
        u /= sigma
        assert np.allclose(normalized["kernel"], W / sigma, rtol=2e-6, atol=0)
        assert np.allclose(state.u["kernel"][0], u, atol=1e-6)


# --- any scale ------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-60, 100])
def test_a_power_of_two_changes_nothing(exponent):
    scaled = jax.tree.map(lambda W: W * np.float32(2.0**exponent), FOUR)
    state, scaled_state = jsn.init(FOUR), jsn.init(scaled)
    same = jax.tree.map(np.array_equal, normalize(FOUR, state), normalize(scaled, scaled_state))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("n_steps", [0, 1])
def test_weights_of_all_scales_side_by_side(n_steps):
    """Each as if alone; zero stays zero, and a NaN stays where it is."""
    W = FOUR["b"]["kernel"]
    scales = {"tiny": 2.0**-100, "small": 1e-8, "one": 1.0, "large": 1e8, "huge": 2.0**100}
    params = {name: {"kernel": W * np.float32(scale)} for name, scale in scales.items()}
    params |= {"zero": {"kernel": 0 * W}, "nan": {"kernel": W.at[0, 0].set(np.nan)}}
    found, state = normalize(params, jsn.init(params), n_steps=n_steps)
    norms = sigmas(params, state)
    for name, scale in scales.items():
        assert np.isclose(true_norm(found[name]["kernel"]), 1, atol=2e-3)
        assert np.allclose(found[name]["kernel"], found["one"]["kernel"], atol=1e-6)
        assert np.isclose(norms[name]["kernel"] / scale, norms["one"]["kernel"], rtol=1e-6)
    assert not found["zero"]["kernel"].any()
    assert norms["zero"]["kernel"] == 0
    assert np.isnan(found["nan"]["kernel"]).all()
    assert np.isnan(norms["nan"]["kernel"])


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
@pytest.mark.parametrize("soft", [False, True])
def test_any_scale_normalizes_to_the_same(scale, soft):
    state = jsn.init(FOUR)
    scaled = jax.tree.map(lambda W: W * np.float32(scale), FOUR)
    expected, _ = normalize(FOUR, state)
    bound = scale if soft else 1.0
    found, _ = normalize(scaled, state, soft=soft, bound=bound)
    for W, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.allclose(W, np.asarray(other) / bound, rtol=1e-5, atol=1e-7)


# --- zero, NaN, lost ------------------------------------------------------------------------


def test_zero_stays_zero(zero_state):
    normalized, new = normalize(jax.tree.map(jnp.zeros_like, TABLE), zero_state)
    assert finite(new)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(normalized))


@pytest.fixture(scope="module")
def awake(zero_state):
    return normalize(TABLE, advanced(TABLE, zero_state, 20))[0]


@each
def test_a_weight_is_normalized_twenty_steps_after_it_was_zero(problem, awake):
    if problem.sigma:
        assert_normalized(awake[problem.name]["kernel"], rtol=1e-3)


@pytest.fixture(scope="module")
def found_again(state):
    """Twenty steps after every block has lost its weight: u^T A = 0, or as near as it gets."""
    lost = {}
    for problem in PROBLEMS:
        u = state.u[problem.name]["kernel"]
        right = np.linalg.svd(problem.W.astype(np.float64))[2]
        lost[problem.name] = {"kernel": jnp.asarray(right[-len(u) :], jnp.float32)}
    state = jsn.SNState(lost, state.operators)
    return normalize(TABLE, advanced(TABLE, state, 20))[0]


@each
def test_a_lost_block_is_back_within_twenty_steps(problem, found_again):
    if problem.sigma:
        assert_normalized(found_again[problem.name]["kernel"], rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n_steps", [0, 1, 3])
def test_a_step_that_is_not_finite_spoils_nothing_else(bad, n_steps):
    def run(at_step_two):
        state, all_steps = jsn.init(FOUR), []
        for step in range(5):
            params = {**FOUR, "b": {"kernel": FOUR["b"]["kernel"] * (1 + step)}}
            if step == 2:
                params["b"]["kernel"] = params["b"]["kernel"].at[1, 2].set(at_step_two)
            before = state
            normalized, state = normalize(params, state, n_steps=n_steps)
            all_steps.append((before, normalized, state))
        return all_steps

    good, broken = run(0.5), run(bad)
    for (_, W, u), (_, other_W, other_u) in zip(good, broken, strict=True):
        for name in ("a", "c", "d"):
            assert np.array_equal(W[name]["kernel"], other_W[name]["kernel"])
            assert np.array_equal(u.u[name]["kernel"], other_u.u[name]["kernel"])
    before, normalized, after = broken[2]
    assert not np.any(np.isfinite(normalized["b"]["kernel"]))
    assert np.array_equal(before.u["b"]["kernel"], after.u["b"]["kernel"])
    assert_normalized(broken[3][1]["b"]["kernel"], rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_init_of_an_unusable_weight_gives_a_state_that_finds_the_norm_later(value):
    params = {**FOUR, "b": {"kernel": jnp.full((36, 40), value)}}
    state = jsn.init(params)
    assert finite(state)
    normalized, _ = normalize(FOUR, advanced(FOUR, state, 20))
    for leaf in jax.tree.leaves(normalized):
        assert_normalized(leaf, rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_recovers(value):
    state = jax.tree.map(lambda u: jnp.full_like(u, value), jsn.init(FOUR))
    normalized, _ = normalize(FOUR, advanced(FOUR, state, 20))
    for leaf in jax.tree.leaves(normalized):
        assert_normalized(leaf, rtol=1e-3)


# --- what goes in and what comes out --------------------------------------------------------


def test_init_is_deterministic_and_the_same_under_jit():
    first, second = jsn.init(FOUR), jsn.init(FOUR)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))
    jitted = jax.jit(jsn.init)(FOUR)
    assert jax.tree.structure(jitted) == jax.tree.structure(first)
    for name, sigma in sigmas(FOUR, jitted).items():
        assert_converged(sigma["kernel"], true_norm(FOUR[name]["kernel"]), rtol=1e-3)


def test_blocks_are_capped_at_the_smaller_side():
    state = jsn.init(FOUR, block_size=9, warmup=0)
    shapes = {name: u["kernel"].shape for name, u in state.u.items()}
    assert shapes == {"a": (9, 40), "b": (9, 40), "c": (8, 8), "d": (1, 1)}
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(state))


def avals(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)


@pytest.mark.parametrize("n_steps", [0, 1, 3])
def test_the_state_keeps_its_structure_and_the_parameters_their_values(n_steps):
    params = {**FOUR, "head": {"bias": jnp.ones(3), "steps": jnp.arange(3), "none": None}}
    state = jsn.init(params)
    copy = jax.tree.map(np.array, params)
    normalized, new = normalize(params, state, n_steps=n_steps)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert avals(new) == avals(state)
    assert jax.tree.structure(normalized) == jax.tree.structure(params)
    assert avals(normalized) == avals(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, copy)))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params["head"], normalized["head"])))
    if n_steps == 0:
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, new, state)))


def test_sigmas_is_a_tree_like_the_parameters():
    W = gaussian(5, 20, 8)
    params = {
        "head": {"kernel": W, "bias": jnp.ones(3), "none": None},
        "stack": np.stack([W, 2 * W]),
    }
    rules = [("stack", Matrix(batch_axis=0)), *jsn.FLAX]
    found = sigmas(params, jsn.init(params, rules=rules), n_steps=1)
    assert found["head"]["bias"] is found["head"]["none"] is None
    assert_converged(found["head"]["kernel"], true_norm(W), rtol=1e-6)
    assert_converged(found["stack"], [true_norm(W), 2 * true_norm(W)], rtol=1e-6)


def test_several_steps_in_one_call_are_several_calls():
    state = jsn.init(FOUR, warmup=0)
    once, _ = normalize(FOUR, state, n_steps=3)
    for _ in range(3):
        expected, state = normalize(FOUR, state)
    for leaf, other in zip(jax.tree.leaves(once), jax.tree.leaves(expected), strict=True):
        assert np.allclose(leaf, other, rtol=1e-5)


# --- transformations ------------------------------------------------------------------------


def test_an_ensemble_vmaps_and_its_state_is_that_of_a_stack():
    params = {"kernel": jnp.asarray(gaussian(9, 4, 20, 24)), "bias": jnp.ones((4, 24))}
    state = jax.jit(jax.vmap(functools.partial(jsn.init, block_size=6)))(params)
    assert state.u["kernel"].shape == (4, 6, 24)
    normalized, new = jax.jit(jax.vmap(jsn.normalize))(params, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert avals(new) == avals(state)
    for weight in normalized["kernel"]:
        assert_normalized(weight, rtol=1e-3)
    # Outside vmap the same state is seen for what it is: one block for each matrix of a stack.
    outside, other = normalize(params, state)
    assert avals(other) == avals(state)
    assert np.allclose(outside["kernel"], normalized["kernel"], rtol=1e-5)
    assert sigmas(params, state)["kernel"].shape == (4,)


def test_a_state_of_stacked_convolutions_is_seen_for_what_it_is():
    kernels = gaussian(0, 2, 3, 3, 2, 4)
    conv = jsn.Conv((5, 5, 2))
    init = functools.partial(jsn.init, rules=[("kernel", conv)], block_size=4)
    params = {"kernel": jnp.asarray(kernels)}
    found = sigmas(params, jax.jit(jax.vmap(init))(params))["kernel"]
    assert found == pytest.approx([jsn.upper_bound(K, operator=conv) for K in kernels], rel=1e-3)


def test_a_state_that_tracks_nothing_changes_nothing():
    params, state = {"kernel": 2 * jnp.eye(3)}, jsn.SNState({"kernel": None}, ())
    normalized, new = jsn.normalize(params, state)
    assert np.array_equal(normalized["kernel"], params["kernel"])
    assert new == state


def test_layers_scan():
    params = {"kernel": jnp.asarray(gaussian(10, 4, 20, 20))}
    state = jax.jit(jax.vmap(functools.partial(jsn.init, block_size=6)))(params)

    @jax.jit
    def forward(params, state, x):
        def layer(x, xs):
            normalized, state = jsn.normalize(*xs)
            return x @ normalized["kernel"], (normalized, state)

        return jax.lax.scan(layer, x, (params, state))

    _, (normalized, new) = forward(params, state, jnp.ones(20))
    assert avals(new) == avals(state)
    for weight in normalized["kernel"]:
        assert_normalized(weight, rtol=1e-3)


def test_a_training_step_donates_parameters_and_state(recwarn):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        def loss(params):
            normalized, new = jsn.normalize(params, state)
            return jnp.sum(normalized["kernel"] ** 3), new

        gradient, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), new

    params = {"kernel": jnp.asarray(gaussian(11, 20, 24))}
    state = jsn.init(params)
    old = (params, state)
    for _ in range(3):
        params, state = step(params, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not [w for w in recwarn if "donated" in str(w.message)]
    assert_normalized(normalize(params, state)[0]["kernel"], rtol=1e-3)


# --- dtypes and views -----------------------------------------------------------------------


def test_half_precision_is_divided_in_float32_and_cast_last():
    dtypes = {"a": jnp.bfloat16, "b": jnp.float16, "c": jnp.bfloat16, "d": jnp.float16}
    half = {name: {"kernel": FOUR[name]["kernel"].astype(t)} for name, t in dtypes.items()}
    single = jax.tree.map(lambda W: W.astype(jnp.float32), half)
    state = jsn.init(half)
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(state))
    found, new = normalize(half, state)
    expected, expected_new = normalize(single, state)
    assert {name: leaf["kernel"].dtype for name, leaf in found.items()} == dtypes
    same = lambda x, y: np.array_equal(x, y.astype(x.dtype))
    assert all(jax.tree.leaves(jax.tree.map(same, found, expected)))
    assert all(jax.tree.leaves(jax.tree.map(same, new, expected_new)))


@pytest.mark.skipif(not X64, reason="float64 needs JAX_ENABLE_X64=1")
def test_float64_weights_are_normalized_in_float64():
    params = {"double": {"kernel": gaussian(12, 40, 30).astype(np.float64)}, **FOUR}
    state = jsn.init(params)
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(state))
    normalized = fold(params, state, n_steps=60)
    assert normalized["double"]["kernel"].dtype == jnp.float64
    assert normalized["a"]["kernel"].dtype == jnp.float32
    assert abs(true_norm(normalized["double"]["kernel"]) - 1) < 1e-9


def test_numpy_parameters():
    params = {"kernel": gaussian(13, 20, 24)}
    normalized, _ = normalize(params, jsn.init(params))
    assert_normalized(normalized["kernel"], rtol=1e-3)
    assert isinstance(params["kernel"], np.ndarray)


def test_batch_axes_are_normalized_one_by_one():
    W = gaussian(14, 3, 20, 2, 24) * np.geomspace(1e-3, 1e3, 6).reshape(3, 1, 2, 1)
    params = {"experts": jnp.asarray(W, jnp.float32)}
    rules = [("experts", Matrix(in_axis=1, out_axis=3, batch_axis=(0, 2)))]
    state = jsn.init(params, rules=rules)
    normalized, _ = normalize(params, state)
    for i in range(3):
        for j in range(2):
            assert_normalized(normalized["experts"][i, :, j], rtol=1e-3)


@pytest.mark.parametrize("name", ["gap", "gaussian"])
def test_convolution_kernels_are_seen_as_all_but_the_last_axis(name):
    W = named(name).W[:36]
    params = {"kernel": jnp.asarray(W.reshape(3, 3, 4, -1))}
    normalized, _ = normalize(params, jsn.init(params))
    assert_normalized(normalized["kernel"], rtol=1e-3)


# --- cost -----------------------------------------------------------------------------------


def test_each_weight_is_read_twice_a_step_and_no_third_time_for_the_gradient():
    params = {"a": {"kernel": jnp.ones((23, 29))}, "b": {"kernel": jnp.ones((3, 3, 5, 31))}}
    state = jsn.init(params, block_size=8, warmup=0)

    def total(params, n_steps):
        return sum(map(jnp.sum, jax.tree.leaves(jsn.normalize(params, state, n_steps=n_steps)[0])))

    for W in jax.tree.leaves(params):
        for n_steps, expected in ((0, 1), (1, 2), (4, 8)):
            function = functools.partial(total, n_steps=n_steps)
            assert jaxprs.reads(function, params, size=W.size) == expected
            assert jaxprs.reads(jax.value_and_grad(function), params, size=W.size) == expected


def test_nothing_of_the_size_of_a_block_is_baked_into_the_program():
    params = {"kernel": jnp.ones((23, 29))}
    state = jsn.init(params, warmup=0)
    assert jaxprs.largest_constant(jsn.normalize, params, state) <= 16
    assert jaxprs.largest_constant(lambda params: jsn.init(params).u, params) <= 16


def mlp(params, x):
    x = jax.lax.conv(x, params["conv"]["kernel"], (1, 1), "SAME")
    return jnp.tanh(x.reshape(len(x), -1) @ params["dense"]["kernel"]) @ params["head"]["kernel"]


def test_a_folded_model_costs_exactly_what_the_plain_one_does():
    params = {
        "conv": {"kernel": jnp.asarray(gaussian(15, 4, 3, 3, 3))},
        "dense": {"kernel": jnp.asarray(gaussian(16, 4 * 25, 8))},
        "head": {"kernel": jnp.asarray(gaussian(17, 8, 2))},
    }
    x = jnp.ones((2, 3, 5, 5), jnp.float32)
    state = jsn.init(params, warmup=0)
    folded = fold(params, state)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    assert avals(folded) == avals(params)
    text = lambda params: jax.jit(mlp).lower(params, x).as_text()
    assert text(folded) == text(params)
    unfolded = lambda params, x: mlp(jsn.normalize(params, state, n_steps=0)[0], x)
    costs = [jaxprs.count(model, params, x)["dot_general"] for model in (mlp, unfolded)]
    assert costs[0] < costs[1]


def test_the_gradient_of_one_weight_does_not_depend_on_what_else_is_differentiated():
    params = {name: jnp.asarray(gaussian(i, 9 + i, 6)) for i, name in enumerate("ab")}
    params = {name: {"kernel": W} for name, W in params.items()}
    state = jsn.init(params, block_size=4)

    def loss(params):
        normalized, _ = jsn.normalize(params, state)
        return sum(jnp.sum(jnp.sin(W)) for W in jax.tree.leaves(normalized))

    whole = jax.grad(loss)(params)
    alone = jax.grad(lambda a: loss({"a": a, "b": params["b"]}))(params["a"])
    np.testing.assert_array_equal(alone["kernel"], whole["a"]["kernel"])
