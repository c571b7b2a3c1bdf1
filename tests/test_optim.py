"""Norm constraints and penalties as optax transformations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jsn

SLOW = pytest.mark.slow
SHAPES = {"first": (8, 16), "second": (16, 4)}


def make_params(scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return {
        name: {
            "kernel": jnp.asarray(scale * rng.normal(size=shape), dtype),
            "bias": jnp.asarray(rng.normal(size=shape[-1:]), dtype),
        }
        for name, shape in SHAPES.items()
    }


def make_grads(seed, params):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def norm(W):
    return np.linalg.norm(np.asarray(W, np.float64), 2)


def norms(params):
    return {name: norm(layer["kernel"]) for name, layer in params.items()}


def singular_values(W):
    return np.linalg.svd(np.asarray(W, np.float64), compute_uv=False)


@functools.cache
def stepper(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, steps=8, check=lambda params: None):
    state, step = tx.init(params), stepper(tx)
    for seed in range(steps):
        params, state = step(params, state, make_grads(seed, params))
        check(params)
    return params, state


# --- keep_spectral_norm_below -----------------------------------------------------------------


def is_below(W, limit):
    """Whether the norm of W is below the limit, proven up to float64 rounding by Cholesky."""
    W = np.asarray(W, np.float64)
    gram = W @ W.T if W.shape[0] < W.shape[1] else W.T @ W
    try:
        np.linalg.cholesky(limit**2 * np.eye(len(gram)) - gram)
    except np.linalg.LinAlgError:
        return False
    return True


def test_is_below_sees_both_sides():
    W = np.diag([3.0, 1.0])
    assert is_below(W, 3.0001)
    assert not is_below(W, 2.9999)


def test_true_norm_stays_below_the_bound_for_300_adam_steps_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    inputs, labels = datasets.load_digits(return_X_y=True)
    inputs = np.asarray(inputs / 16, np.float32)
    sizes = [64, 128, 128, 128, 10]
    rng = np.random.default_rng(0)
    params = [
        {
            "kernel": jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / shape[0]), jnp.float32),
            "bias": jnp.zeros(shape[1]),
        }
        for shape in itertools.pairwise(sizes)
    ]
    # Adam's first update has one sign a column: with norm 1.3 here it is larger than the weight.
    tx = optax.chain(optax.adam(1e-2), jsn.optim.keep_spectral_norm_below(1.0))

    def loss(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(jnp.matmul(x, layer["kernel"]) + layer["bias"][None])
        logits = jnp.matmul(x, params[-1]["kernel"]) + params[-1]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(20 * logits, y).mean()

    @jax.jit
    def trained(carry, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss)(params, jnp.asarray(inputs)[batch], jnp.asarray(labels)[batch])
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), [layer["kernel"] for layer in params]

        return jax.lax.scan(step, carry, batches)

    batches = jnp.asarray(rng.integers(0, len(inputs), (300, 128)))
    (landed, state), kernels = trained((params, tx.init(params)), batches)
    for trajectory in kernels:
        assert len(trajectory) == state[1].count == 300
        assert all(is_below(W, 1 + 1e-3) for W in trajectory)
    assert loss(landed, inputs, labels) < loss(params, inputs, labels) / 4


OPTIMIZERS = {
    "sgd": lambda keep: optax.chain(optax.sgd(0.3, momentum=0.9), keep),
    "adam": lambda keep: optax.chain(optax.adam(0.1), keep),
    "adamw": lambda keep: optax.chain(optax.adamw(0.1, weight_decay=0.1), keep),
    "muon": lambda keep: optax.chain(optax.contrib.muon(0.1), keep),
    "multi steps": lambda keep: optax.MultiSteps(optax.chain(optax.adam(0.1), keep), 2),
    "if finite": lambda keep: optax.apply_if_finite(optax.chain(optax.adam(0.1), keep), 3),
    "scheduled": lambda keep: optax.chain(
        optax.adam(optax.cosine_decay_schedule(0.1, 8)), optax.clip_by_global_norm(1.0), keep
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("adam", "muon", "multi steps") else pytest.param(name, marks=SLOW)
        for name in OPTIMIZERS
    ],
)
def test_keep_composes_with_optimizers(name):
    tx = OPTIMIZERS[name](jsn.optim.keep_spectral_norm_below(2.0))
    params, _ = train(tx, make_params(0.1), 8)
    if name == "multi steps":
        assert all(value <= 2 * (1 + 1e-5) for value in norms(params).values())

    def check(params):
        assert all(value <= 2 * (1 + 1e-5) for value in norms(params).values())

    params, _ = train(tx, params, 6, check)


def test_weights_below_the_bound_and_other_leaves_move_as_without_jsn():
    params = make_params(0.01)
    grads = make_grads(0, params)
    tx = jsn.optim.keep_spectral_norm_below({"first": 1e-3, "second": 1e3})
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["second"]["kernel"], grads["second"]["kernel"])
    np.testing.assert_array_equal(updates["first"]["bias"], grads["first"]["bias"])
    moved = optax.apply_updates(params, updates)
    assert norm(moved["first"]["kernel"]) == pytest.approx(1e-3, rel=1e-4)


def test_keep_is_the_scaling_of_gouk():
    params = make_params(3.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = transformations()["keep"]
    W = np.asarray(params["first"]["kernel"], np.float64)
    landed = stepper(tx)(params, tx.init(params), zeros)[0]["first"]["kernel"]
    np.testing.assert_allclose(landed, W / norm(W), rtol=1e-4, atol=1e-6)


def test_masked_weights_move_freely():
    mask = {"first": True, "second": False}
    tx = optax.chain(optax.sgd(1.0), optax.masked(jsn.optim.keep_spectral_norm_below(1.0), mask))
    params, _ = train(tx, make_params())
    assert norms(params)["first"] == pytest.approx(1, rel=1e-4)
    assert norms(params)["second"] > 5


def test_a_schedule_is_followed():
    tx = jsn.optim.keep_spectral_norm_below(lambda count: 2.0 - 0.5 * count)
    params, seen = make_params(), []
    train(tx, params, 3, lambda params: seen.append(norms(params)["first"]))
    np.testing.assert_allclose(seen, [2.0, 1.5, 1.0], rtol=1e-3)


def test_a_learned_bound_is_taken_as_it_comes():
    params = make_params()
    state = jsn.optim.keep_spectral_norm_below(1.0).init(params)

    @jax.jit
    def step(params, state, bound):
        tx = jsn.optim.keep_spectral_norm_below(bound)
        updates, state = tx.update(make_grads(0, params), state, params)
        return optax.apply_updates(params, updates), state

    for bound in (1.0, 0.5):
        assert norms(step(params, state, bound)[0])["first"] == pytest.approx(bound, rel=1e-3)


def test_inject_hyperparams_puts_the_bound_into_the_state():
    make = optax.inject_hyperparams(
        jsn.optim.keep_spectral_norm_below, static_args=("rules", "block_size", "warmup", "n_steps")
    )
    tx = make(bound=0.5)
    params = make_params()
    state = tx.init(params)
    assert state.hyperparams["bound"] == 0.5
    params, _ = stepper(tx)(params, state, make_grads(0, params))
    assert norms(params)["first"] == pytest.approx(0.5, rel=1e-3)


def test_bfloat16_parameters_keep_their_dtype():
    tx = optax.chain(optax.adam(0.1), jsn.optim.keep_spectral_norm_below(1.0))
    params, _ = train(tx, make_params(dtype=jnp.bfloat16))
    assert params["first"]["kernel"].dtype == jnp.bfloat16
    assert all(value <= 1 + 2**-7 for value in norms(params).values())
    mixed = make_params(dtype=jnp.bfloat16)
    tx = jsn.optim.keep_spectral_norm_below(1.0)
    grads = jax.tree.map(lambda p: p.astype(jnp.float32), make_grads(0, mixed))
    landed, _ = stepper(tx)(mixed, tx.init(mixed), grads)
    assert landed["first"]["kernel"].dtype == jnp.bfloat16


def test_none_leaves_pass():
    params = {**make_params(), "frozen": None}
    params["second"]["kernel"] = None
    grads = {**make_grads(0, make_params()), "frozen": None}
    grads["second"]["kernel"] = None
    for tx in transformations().values():
        landed, state = stepper(tx)(params, tx.init(params), grads)
        assert landed["frozen"] is landed["second"]["kernel"] is None
        stepper(tx)(landed, state, grads)


def test_zero_weights_stay_zero_and_recover():
    params = jax.tree.map(jnp.zeros_like, make_params())
    zeros = params
    for name, tx in transformations().items():
        state = tx.init(params)
        step = stepper(tx)
        landed, state = step(params, state, zeros)
        for leaf in jax.tree.leaves(landed):
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
        if name != "decay":
            for seed in range(4):
                landed, state = step(landed, state, make_grads(seed, params))
            assert all(0 < value <= 1 + 1e-3 for value in norms(landed).values())


def test_a_nan_update_spoils_neither_the_state_nor_other_weights():
    params = make_params()
    grads = make_grads(0, params)
    bad = {
        **grads,
        "first": {**grads["first"], "kernel": grads["first"]["kernel"].at[0].set(jnp.nan)},
    }
    for name, tx in transformations().items():
        state, step = tx.init(params), stepper(tx)
        spoilt, after = step(params, state, bad)
        assert np.isnan(spoilt["first"]["kernel"]).any()
        assert np.isfinite(spoilt["second"]["kernel"]).all()
        if name != "decay":
            landed, _ = step(params, after, grads)  # the caller dropped that step
            assert norms(landed)["first"] <= 1 + 1e-3


# --- add_spectral_decay -----------------------------------------------------------------------


def float64_penalty_gradient(params, weight):
    """jax.grad of weight / 2 * sigma^2 in float64, through an SVD."""
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(True):
        penalty = lambda W: weight / 2 * jnp.linalg.norm(W, 2) ** 2
        return {
            name: np.asarray(jax.grad(penalty)(jnp.asarray(np.asarray(x["kernel"], np.float64))))
            for name, x in params.items()
        }


@pytest.mark.parametrize("scale", [1.0, pytest.param(1e-3, marks=SLOW)], ids=["one", "small"])
def test_decay_is_the_gradient_of_the_float64_penalty(scale):
    rng = np.random.default_rng(2)
    params = {
        name: {"kernel": jnp.asarray(scale * rng.normal(size=shape), jnp.float32)}
        for name, shape in {"wide": (64, 200), "square": (128, 128), "thin": (300, 10)}.items()
    }
    tx = jsn.optim.add_spectral_decay(0.1)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        expected = float64_penalty_gradient(params, 0.1)
        for name, exact in expected.items():
            error = np.linalg.norm(np.asarray(updates[name]["kernel"], np.float64) - exact)
            assert error <= 1e-4 * np.linalg.norm(exact)
        params = jax.tree.map(lambda p, u: p - u, params, updates)  # gradient descent on it


def test_decay_lowers_the_largest_singular_value_alone():
    W = jnp.diag(jnp.array([3.0, 1.0, 0.5]))
    tx = optax.chain(jsn.optim.add_spectral_decay(lambda count: 0.1 * (count + 1)), optax.sgd(1.0))
    zeros = {"kernel": jnp.zeros((3, 3))}
    params, state = stepper(tx)({"kernel": W}, tx.init({"kernel": W}), zeros)
    np.testing.assert_allclose(params["kernel"], np.diag([2.7, 1.0, 0.5]), atol=1e-6)
    params, _ = stepper(tx)(params, state, zeros)
    np.testing.assert_allclose(params["kernel"], np.diag([2.16, 1.0, 0.5]), atol=1e-5)


def test_decay_adds_to_the_update_and_leaves_others_alone():
    params = {**make_params(), "step": jnp.int32(3)}
    grads = {**make_grads(0, make_params()), "step": jnp.int32(1)}
    tx = jsn.optim.add_spectral_decay(0.1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["first"]["bias"], grads["first"]["bias"])
    assert updates["step"] == 1
    exact = float64_penalty_gradient(make_params(), 0.1)["first"]
    added = np.asarray(updates["first"]["kernel"]) - np.asarray(grads["first"]["kernel"])
    np.testing.assert_allclose(added, exact, rtol=1e-3, atol=1e-5)


# --- soft_cap and hard_cap --------------------------------------------------------------------


def apply(tx, W, update=None):
    params = {"kernel": jnp.asarray(W, jnp.float32)}
    updates = {"kernel": jnp.zeros_like(params["kernel"]) if update is None else update}
    return np.asarray(stepper(tx)(params, tx.init(params), updates)[0]["kernel"], np.float64)


def with_values(s, shape, seed=0):
    """A matrix with these singular values."""
    U, _, Vh = np.linalg.svd(np.random.default_rng(seed).normal(size=shape), full_matrices=False)
    return (U * s) @ Vh


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (12, 12)])
def test_hard_cap_is_the_nearest_matrix(shape):
    s = np.linspace(0.1, 2.5, min(shape))
    W = with_values(s, shape)
    U, s, Vh = np.linalg.svd(W.astype(np.float32).astype(np.float64), full_matrices=False)
    landed = apply(jsn.optim.hard_cap(1.0), W)
    np.testing.assert_allclose(landed, (U * np.minimum(s, 1)) @ Vh, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_hard_cap_is_scale_free_and_leaves_small_weights_alone(scale):
    W = with_values(np.linspace(0.1, 2.5, 6), (6, 9)) * scale
    landed = apply(jsn.optim.hard_cap(scale), W)
    assert norm(landed / scale) == pytest.approx(1, rel=1e-5)
    small = np.float32(W / 4)
    np.testing.assert_array_equal(np.float32(apply(jsn.optim.hard_cap(scale), small)), small)


def test_caps_see_the_axes_and_batches_of_the_view():
    W = np.random.default_rng(0).normal(size=(3, 5, 2, 4))
    rules = [("kernel", jsn.Matrix(in_axis=(1, 3), out_axis=2, batch_axis=0))]
    for tx in (
        jsn.optim.hard_cap(1.0, rules=rules),
        jsn.optim.soft_cap(1.0, max_update=0.2, rules=rules),
    ):
        landed = np.moveaxis(apply(tx, W), 2, -1).reshape(3, 20, 2)
        for before, after in zip(np.moveaxis(W, 2, -1).reshape(3, 20, 2), landed, strict=True):
            assert norm(after) <= 1 + 1e-4
            assert norm(after) > 0.5
            cosine = np.sum(before * after) / np.linalg.norm(before) / np.linalg.norm(after)
            assert cosine > 0.9


def test_soft_cap_is_the_two_polynomials():
    bound, reach = 1.0, 1.25
    s = np.linspace(0, reach, 9)
    landed = apply(jsn.optim.soft_cap(bound, max_update=reach - bound), with_values(s, (9, 12)))
    k, w = reach, bound
    roots = np.roots([-(k**9), 3 * k**7, -3 * k**5, 0, k - w])
    a = min(r.real for r in roots if abs(r.imag) < 1e-9 and r.real >= 0)
    assert a * k**2 <= 1 / 3
    first = s - a * s**3
    np.testing.assert_allclose(
        singular_values(landed), np.sort(first + a * first**3)[::-1], atol=3e-6
    )
    assert singular_values(landed)[0] == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("max_update", [0.0, 0.01, 0.3])
def test_soft_cap_is_a_cap_for_every_update_it_allows(max_update):
    tx = jsn.optim.soft_cap(1.0, max_update=max_update, weight_decay=0.0)
    W = with_values(np.linspace(0.2, 1.0, 8), (8, 8))
    worst = with_values(np.linspace(0.2, 1.0, 8) * 0 + max_update, (8, 8))
    landed = apply(tx, W, jnp.asarray(worst, jnp.float32))
    assert singular_values(landed)[0] <= 1 + 1e-5
    large = apply(tx, 30 * W)
    assert singular_values(large)[0] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"max_update": 0.5}, {"max_update": 0.3, "bound": 0.9}, {"max_update": float("nan")}],
)
def test_soft_cap_refuses_parameters_for_which_it_is_no_cap(options):
    with pytest.raises(ValueError, match=r"too large for the soft cap to undo.*a k\^2 <= 1/3"):
        jsn.optim.soft_cap(**{"bound": 1.0, **options})


def test_soft_cap_allows_what_weight_decay_takes_away():
    tx = jsn.optim.soft_cap(1.0, max_update=0.35, weight_decay=0.1)
    assert norm(apply(tx, with_values(np.full(4, 1.25), (4, 4)))) == pytest.approx(1, rel=1e-4)


def test_soft_cap_with_a_schedule_scales_down_what_it_cannot_undo():
    tx = jsn.optim.soft_cap(lambda count: 1.0 - 0.2 * count, max_update=lambda count: 5.0)
    params, seen = {"kernel": jnp.asarray(with_values(np.full(4, 6.0), (4, 4)), jnp.float32)}, []
    train(tx, params, 3, lambda params: seen.append(norm(params["kernel"])))
    np.testing.assert_allclose(seen, [1.0, 0.8, 0.6], rtol=1e-3)


def test_caps_hold_while_muon_trains():
    for cap in (jsn.optim.hard_cap(1.0), jsn.optim.soft_cap(1.0, max_update=0.25)):
        tx = optax.chain(optax.contrib.muon(0.1), cap)

        def check(params):
            assert all(value <= 1 + 1e-4 for value in norms(params).values())

        train(tx, make_params(0.1), 5, check)


# --- all of them ------------------------------------------------------------------------------


@functools.cache
def transformations(rules=jsn.FLAX):
    return {
        "keep": jsn.optim.keep_spectral_norm_below(1.0, rules=rules),
        "decay": jsn.optim.add_spectral_decay(0.1, rules=rules),
        "soft": jsn.optim.soft_cap(1.0, max_update=0.1, rules=rules),
        "hard": jsn.optim.hard_cap(1.0, rules=rules),
    }


@pytest.mark.parametrize("name", transformations())
def test_states_keep_their_structure_under_scan(name):
    tx = transformations()[name]
    params = make_params()
    grads = make_grads(0, params)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=3))(
        (params, tx.init(params))
    )
    assert state.count == 3


@pytest.mark.parametrize(
    "name", ["keep", *[pytest.param(x, marks=SLOW) for x in ("decay", "soft", "hard")]]
)
def test_nnx_optimizer(name):
    module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.5), transformations()[name])
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        grads = nnx.grad(lambda module: -module(x).sum())(module)
        optimizer.update(module, grads)

    for _ in range(3):
        step(module, optimizer, jnp.ones((2, 8)))
    assert name == "decay" or norm(module.kernel[...]) <= 1 + 1e-4


def test_bounds_as_a_tree():
    bound = {"first": 0.5, "second": {"kernel": 0.25, "bias": 1.0}}
    for tx in (
        jsn.optim.keep_spectral_norm_below(bound),
        jsn.optim.hard_cap(bound),
        jsn.optim.soft_cap(bound, max_update=0.01),
    ):
        params = make_params()
        params, _ = stepper(tx)(params, tx.init(params), make_grads(0, params))
        np.testing.assert_allclose(list(norms(params).values()), [0.5, 0.25], rtol=1e-3)


def test_a_bound_for_each_matrix_of_a_stack():
    params = {"stack": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)), jnp.float32)}
    bounds = jnp.asarray([0.5, 1.0, 2.0])
    tx = jsn.optim.hard_cap(bounds, rules=[("stack", jsn.Matrix(batch_axis=0))])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    capped = np.asarray(params["stack"] + updates["stack"])
    np.testing.assert_allclose(np.linalg.norm(capped, 2, axis=(1, 2)), bounds, rtol=1e-4)


def test_without_steps_the_vectors_stay_as_they_are():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}
    tx = jsn.optim.keep_spectral_norm_below(1.0, n_steps=0)
    state = tx.init(params)
    updates, new = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert np.linalg.norm(params["kernel"] + updates["kernel"], 2) == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(new.sn_state.u["kernel"], state.sn_state.u["kernel"])


def test_errors():
    params = make_params()
    for name, tx in transformations().items():
        with pytest.raises(ValueError, match=r"jsn.optim.\w+: needs the parameters"):
            tx.update(params, tx.init(params))
        with pytest.raises(ValueError, match="no leaf of the parameters is normalized"):
            tx.init({"bias": params["first"]["bias"]})
        assert name
    for make in (
        jsn.optim.keep_spectral_norm_below,
        jsn.optim.hard_cap,
        functools.partial(jsn.optim.soft_cap, max_update=0.0),
    ):
        for bound in (0.0, -1.0, float("nan"), {"first": 1.0, "second": 0.0}):
            with pytest.raises(ValueError, match=r"jsn.optim.\w+: bound is not usable"):
                make(bound)
    with pytest.raises(ValueError, match="n_steps is -1"):
        jsn.optim.add_spectral_decay(0.1, n_steps=-1)
    with pytest.raises(ValueError, match="n_steps is -1"):
        jsn.optim.keep_spectral_norm_below(1.0, n_steps=-1)


def test_caps_refuse_views_that_are_no_matrices():
    rules = (("kernel", jsn.Conv((8, 8, 2))),)
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4))}}
    for name in ("soft", "hard"):
        with pytest.raises(ValueError, match=r"conv/kernel: rule Conv"):
            transformations(rules)[name].init(params)
    keep = transformations(rules)["keep"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    landed = stepper(keep)(params, keep.init(params), zeros)[0]["conv"]["kernel"]
    assert float(landed[0, 0, 0, 0]) < 0.2
