"""Station 5: hard, soft, learned scale, trees of bounds, and the gradients of all of them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from matrices import gaussian, named, true_norm, with_spectrum

import jsn
from jsn import Matrix

X64 = jax.config.jax_enable_x64
normalize = jax.jit(jsn.normalize, static_argnames=("n_steps", "soft"))

PARAMS = {
    "enc": {"kernel": jnp.asarray(named("gap").W), "bias": jnp.ones(48)},  # norm 3
    "dec": {"kernel": jnp.asarray(named("decaying").W), "bias": jnp.ones(48)},  # norm 5
}


@pytest.fixture(scope="module")
def state():
    state = jsn.init(PARAMS)
    for _ in range(40):
        _, state = normalize(PARAMS, state)
    return state


def norms(normalized):
    return [true_norm(normalized[name]["kernel"]) for name in ("enc", "dec")]


# --- hard, soft, scale ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1, 1)),
        ({"bound": 2.5}, (2.5, 2.5)),
        ({"bound": 4}, (4, 4)),
        ({"bound": 1e-20}, (1e-20, 1e-20)),
        ({"soft": True}, (1, 1)),
        ({"soft": True, "bound": 4}, (3, 4)),
        ({"soft": True, "bound": np.inf}, (3, 5)),
        ({"scale": 2.0}, (2, 2)),
        ({"scale": -2.0, "bound": 3.0}, (6, 6)),
        ({"scale": 0.5, "bound": 4.0, "soft": True}, (1.5, 2)),
        ({"bound": {"enc": 2.0, "dec": 3.0}}, (2, 3)),
        ({"bound": {"enc": {"kernel": 2.0, "bias": None}, "dec": 3.0}}, (2, 3)),
        ({"scale": {"enc": 2.0, "dec": None}}, (2, 1)),
        ({"bound": {"enc": 2.0, "dec": 3.0}, "scale": {"enc": None, "dec": 0.5}}, (2, 1.5)),
    ],
    ids=str,
)
def test_norms_are_what_is_asked_for(state, options, expected):
    soft = options.pop("soft", False) if (options := dict(options)) else False
    normalized, _ = normalize(PARAMS, state, soft=soft, **options)
    assert np.allclose(norms(normalized), expected, rtol=2e-6, atol=0)
    for name in ("enc", "dec"):
        assert np.array_equal(normalized[name]["bias"], PARAMS[name]["bias"])


def test_soft_leaves_a_small_weight_exactly_as_it_is(state):
    normalized, _ = normalize(PARAMS, state, soft=True, bound=4.0)
    assert np.array_equal(normalized["enc"]["kernel"], PARAMS["enc"]["kernel"])
    assert not np.array_equal(normalized["dec"]["kernel"], PARAMS["dec"]["kernel"])


def test_a_negative_scale_turns_the_sign(state):
    plus, _ = normalize(PARAMS, state, scale=1.5)
    minus, _ = normalize(PARAMS, state, scale=-1.5)
    assert np.array_equal(plus["enc"]["kernel"], -minus["enc"]["kernel"])


@pytest.mark.parametrize("form", [float, np.float32, jnp.float32, np.array, jnp.array])
def test_a_static_bound_may_be_any_number(state, form):
    normalized, _ = jsn.normalize(PARAMS, state, n_steps=0, bound=form(2.0), scale=form(1.5))
    assert np.allclose(norms(normalized), 3.0, rtol=1e-5)


def test_a_traced_bound_is_not_compiled_in(state):
    traces = []

    @jax.jit
    def step(bound, scale):
        traces.append(1)
        return jsn.normalize(PARAMS, state, bound=bound, scale=scale)[0]

    for bound, scale in ((2.0, 1.0), (3.0, 2.0)):
        assert np.allclose(norms(step(bound, scale)), bound * scale, rtol=2e-6)
        tree = {"enc": jnp.float32(bound), "dec": jnp.float32(1.0)}
        assert np.allclose(norms(step(tree, scale)), [bound * scale, scale], rtol=2e-6)
    assert len(traces) == 2


def test_each_matrix_of_a_stack_may_have_its_own_bound():
    W = np.stack([named("gap").W, named("decaying").W])
    params = {"kernel": jnp.asarray(W)}
    state = jsn.init(params, rules=[("kernel", Matrix(batch_axis=0))], warmup=60)
    for bound in (np.array([2.0, 4.0]), jnp.array([2.0, 4.0]), {"kernel": np.array([2.0, 4.0])}):
        normalized, _ = normalize(params, state, bound=bound)
        assert np.allclose([true_norm(w) for w in normalized["kernel"]], [2, 4], rtol=2e-6)
    soft, _ = normalize(params, state, bound=np.array([4.0, 2.0]), soft=True)
    assert np.array_equal(soft["kernel"][0], W[0])
    assert np.isclose(true_norm(soft["kernel"][1]), 2, rtol=2e-6)


def test_a_box_is_a_leaf_of_a_prefix_too(state):
    box = lambda W: nn.Partitioned(W, names=(None, "x"))
    params = jax.tree.map(lambda x: x, PARAMS)
    params["enc"]["kernel"] = box(params["enc"]["kernel"])
    for bound in ({"enc": 2.0, "dec": 1.0}, {"enc": {"kernel": 2.0, "bias": 9.0}, "dec": 1.0}):
        normalized, _ = jsn.normalize(params, state, n_steps=0, bound=bound)
        assert np.isclose(true_norm(normalized["enc"]["kernel"].value), 2.0, rtol=1e-5)


# --- gradients ------------------------------------------------------------------------------

COSTS = {name: gaussian(seed, 64, 48) for seed, name in enumerate(("enc", "dec"))}


def loss(params, state, **options):
    normalized, _ = jsn.normalize(params, state, **options)
    return sum(jnp.vdot(COSTS[name], normalized[name]["kernel"]) for name in COSTS)


loss_gradient = jax.jit(jax.grad(loss), static_argnames=("n_steps", "soft"))


def exact_loss(params, bound=1.0, soft=False, scale=1.0):
    """The same in float64, with the true norm."""
    total = 0.0
    for name, cost in COSTS.items():
        W = np.asarray(params[name]["kernel"], np.float64)
        sigma = true_norm(W)
        factor = min(1.0, bound / sigma) if soft else bound / sigma
        total += np.sum(cost * W) * factor * scale
    return total


OPTIONS = [
    {},
    {"bound": 2.5},
    {"soft": True, "bound": 4.0},  # active for one weight, not for the other
    {"bound": 2.0, "scale": 1.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_float64_finite_differences(state, options):
    gradient = loss_gradient(PARAMS, state, **options)
    for seed, name in enumerate(COSTS):
        direction = gaussian(10 + seed, 64, 48).astype(np.float64)
        moved = []
        for step in (1e-6, -1e-6):
            W = np.asarray(PARAMS[name]["kernel"], np.float64) + step * direction
            moved.append(exact_loss({**PARAMS, name: {"kernel": W}}, **options))
        exact = (moved[0] - moved[1]) / 2e-6
        found = np.sum(np.asarray(gradient[name]["kernel"], np.float64) * direction)
        assert np.isclose(found, exact, rtol=2e-5)


@pytest.mark.parametrize("n_steps", [0, 1])
def test_under_the_hard_constraint_the_gradient_is_orthogonal_to_the_weight(state, n_steps):
    """The loss does not change along W; this holds for any stored block, true or not."""
    for start in (state, jsn.init(PARAMS, warmup=0)):
        gradient = loss_gradient(PARAMS, start, n_steps=n_steps)
        for name in COSTS:
            W = np.asarray(PARAMS[name]["kernel"], np.float64)
            G = np.asarray(gradient[name]["kernel"], np.float64)
            assert abs(np.sum(G * W)) < 2e-6 * np.linalg.norm(G) * np.linalg.norm(W)


def test_bound_and_scale_have_gradients(state):
    def of(bound, scale):
        return loss(PARAMS, state, bound=bound, scale=scale)

    found = jax.jit(jax.grad(of, argnums=(0, 1)))(2.0, 1.5)
    for index, exact in enumerate(
        (
            (exact_loss(PARAMS, 2.0 + 1e-6, scale=1.5) - exact_loss(PARAMS, 2.0 - 1e-6, scale=1.5)),
            (exact_loss(PARAMS, 2.0, scale=1.5 + 1e-6) - exact_loss(PARAMS, 2.0, scale=1.5 - 1e-6)),
        )
    ):
        assert np.isclose(found[index], exact / 2e-6, rtol=2e-5)


def test_a_weight_that_is_not_scaled_does_not_feel_its_bound(state):
    """Under a soft bound it is the derivative of W itself; a zero weight has none by its bound."""
    free = loss_gradient(PARAMS, state, soft=True, bound=9.0)
    assert all(np.array_equal(free[name]["kernel"], COSTS[name]) for name in COSTS)
    of = lambda params, bound, soft: loss(params, state, bound=bound, soft=soft)
    assert jax.grad(of, argnums=1)(PARAMS, 9.0, True) == 0
    # Only the weight of norm 5 feels a bound of 4, as if the other were not there.
    bent = jax.grad(of, argnums=1)(PARAMS, 4.0, True)
    alone = {"dec": PARAMS["dec"], "enc": {**PARAMS["enc"], "kernel": jnp.zeros((64, 48))}}
    assert np.isclose(bent, jax.grad(of, argnums=1)(alone, 4.0, False), rtol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("exponent", [-100, -70, 70, 100])
def test_gradients_know_no_scale(state, exponent, soft):
    """W and bound scaled: the gradient scales exactly, nothing overflows on the way."""
    scale = 2.0**exponent
    options = {"soft": soft, "bound": 4.0 if soft else 1.0}
    expected = loss_gradient(PARAMS, state, **options)
    if soft:
        options["bound"] *= scale
    found = loss_gradient(jax.tree.map(lambda W: W * scale, PARAMS), state, **options)
    for name in COSTS:
        G = np.asarray(expected[name]["kernel"], np.float64) / (1 if soft else scale)
        assert np.allclose(found[name]["kernel"], G, rtol=1e-4, atol=1e-6 * np.abs(G).max())


@pytest.mark.parametrize("soft", [False, True])
def test_zero_has_a_finite_gradient(soft):
    zero = {"kernel": jnp.zeros((5, 4))}
    state = jsn.init(zero, warmup=0)
    cost = gaussian(20, 5, 4)
    function = lambda p: jnp.vdot(cost, jsn.normalize(p, state, soft=soft)[0]["kernel"])
    gradient = jax.jit(jax.grad(function))(zero)["kernel"]
    assert np.allclose(gradient, cost)  # zero is left alone


@pytest.mark.parametrize("bound", [1e10, np.inf])
def test_a_soft_bound_far_above_a_tiny_weight_does_not_touch_its_gradient(bound):
    tiny = {"kernel": 1e-30 * gaussian(21, 5, 4)}
    state = jsn.init(tiny, warmup=0)
    cost = gaussian(20, 5, 4)
    function = lambda p, b: jnp.vdot(cost, jsn.normalize(p, state, soft=True, bound=b)[0]["kernel"])
    gradient = jax.jit(jax.grad(function))(tiny, bound)["kernel"]
    assert np.array_equal(gradient, cost)


def test_a_soft_constraint_makes_a_weight_with_a_nan_all_nan():
    params = {"kernel": jnp.eye(4).at[1, 2].set(np.nan)}
    normalized, _ = normalize(params, jsn.init(params, warmup=0), soft=True)
    assert np.all(np.isnan(normalized["kernel"]))


def test_the_state_carries_no_gradient(state):
    def of_the_state(params):
        return sum(jnp.sum(u**3) for u in jax.tree.leaves(jsn.normalize(params, state)[1]))

    assert not any(np.any(G) for G in jax.tree.leaves(jax.jit(jax.grad(of_the_state))(PARAMS)))


def test_forward_mode_agrees_with_reverse_mode(state):
    direction = jax.tree.map(lambda W: jnp.asarray(gaussian(21, *W.shape)), PARAMS)
    function = functools.partial(loss, state=state)
    _, forward = jax.jit(lambda p, d: jax.jvp(function, (p,), (d,)))(PARAMS, direction)
    gradient = loss_gradient(PARAMS, state)
    backward = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    assert np.isclose(forward, backward, rtol=1e-4)


# --- dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", *(["float64"] if X64 else [])])
def test_bound_and_scale_do_not_change_the_dtype_of_a_weight(dtype):
    params = {"kernel": jnp.asarray(with_spectrum(22, 8, 6, [3.0, 2.0, 1.0])).astype(dtype)}
    state = jsn.init(params, warmup=2)
    for value in (np.float64(1.5), jnp.float32(1.5), 3):
        function = lambda p, v=value: jsn.normalize(p, state, bound=v, scale=v, soft=True)[0]
        assert jax.eval_shape(function, params)["kernel"].dtype == dtype
        gradient = jax.grad(lambda p, f=function: f(p)["kernel"].sum())
        assert jax.eval_shape(gradient, params)["kernel"].dtype == dtype


@pytest.mark.parametrize("n_weights", [1, 3])
def test_second_derivatives_are_those_of_fixed_singular_vectors(n_weights):
    """A pair tracked is a constant: sigma is u^T W v, and c W / sigma is differentiated as such."""
    W, C = gaussian(0, n_weights, 5, 4), gaussian(1, n_weights, 5, 4)
    U, _, Vt = np.linalg.svd(W)
    trees = [{str(i): {"kernel": jnp.asarray(x)} for i, x in enumerate(each)} for each in (W, C)]
    params, direction = trees
    state = jsn.init(params)  # a block as wide as the side is exact

    def ours(params):
        return loss(jsn.normalize(params, state)[0])

    def expected(params):
        quotients = {}
        for i, (key, entry) in enumerate(params.items()):
            sigma = U[i, :, 0] @ entry["kernel"] @ Vt[i, 0]
            quotients[key] = {"kernel": entry["kernel"] / sigma}
        return loss(quotients)

    def loss(tree):
        products = jax.tree.map(lambda x, c: jnp.vdot(x, c) ** 2, tree, direction)
        return sum(jax.tree.leaves(products))

    def products_with_the_hessian(function):
        forward = jax.jvp(jax.grad(function), (params,), (direction,))[1]
        along = lambda params: jax.jvp(function, (params,), (direction,))[1]
        return forward, jax.grad(along)(params)

    for found in products_with_the_hessian(ours):
        for key, entry in products_with_the_hessian(expected)[0].items():
            scale = np.abs(entry["kernel"]).max()
            np.testing.assert_allclose(found[key]["kernel"], entry["kernel"], atol=2e-5 * scale)


# --- kernels of convolutions ----------------------------------------------------------------


def derivatives(shape, options):
    """A weight of this shape, normalized; a gradient, a slope, and the gradient of the slope."""
    W, along, cost = (jnp.asarray(x).reshape(shape) for x in gaussian(30, 3, 36, 20))
    state = jsn.init({"kernel": W})

    def loss(W):
        x = jsn.normalize({"kernel": W}, state, **options)[0]["kernel"]
        return jnp.vdot(cost, x) + jnp.sum(x**2), x

    slope = lambda W: jax.jvp(lambda W: loss(W)[0], (W,), (along,))[1]
    gradient, x = jax.grad(loss, has_aux=True)(W)
    return [np.ravel(found) for found in (x, gradient, slope(W), jax.grad(slope)(W))]


@pytest.mark.parametrize("options", [*OPTIONS, {"scale": 0.0}], ids=str)
def test_a_kernel_is_scaled_as_the_matrix_that_it_is(options):
    """It is multiplied in reverse; what comes out, and all its derivatives, are the same."""
    matrix, kernel = (derivatives(shape, options) for shape in [(36, 20), (3, 3, 4, 20)])
    for found, expected in zip(kernel, matrix, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_gradients_of_a_kernel_know_no_scale(exponent, soft):
    scale = 2.0**exponent
    kernel, cost = gaussian(31, 2, 3, 3, 4, 20)
    state = jsn.init({"kernel": jnp.asarray(kernel)})

    def loss(kernel, bound):
        normalized = jsn.normalize({"kernel": kernel}, state, soft=soft, bound=bound)[0]
        return jnp.vdot(cost, normalized["kernel"])

    expected = jax.grad(loss)(kernel, 1.0) / (1 if soft else np.float64(scale))
    found = jax.grad(loss)(kernel * np.float32(scale), scale if soft else 1.0)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_gradients_of_kernels_under_vmap_and_checkpoint():
    kernels, costs = jnp.asarray(gaussian(32, 2, 2, 3, 3, 4, 20))
    state = jsn.init({"kernel": kernels[0]})

    def loss(kernel, cost):
        return jnp.vdot(cost, jsn.normalize({"kernel": kernel}, state)[0]["kernel"])

    found = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(kernels, costs)
    for kernel, cost, gradient in zip(kernels, costs, found, strict=True):
        assert np.allclose(gradient, jax.grad(loss)(kernel, cost), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_uses", [1, 2])
def test_no_pass_both_reverses_and_transposes_a_kernel(n_uses):
    """A convolution asks for both on the way back; one pass of XLA:CPU for both takes longer."""
    model, x = nn.Conv(32, (3, 3)), jnp.ones((n_uses, 2, 8, 8, 16))
    params = model.init(jax.random.key(0), x[0])["params"]
    state = jsn.init(params, block_size=4, warmup=0)

    def loss(params, x):
        normalized, _ = jsn.normalize(params, state)
        return sum(jnp.sum(model.apply({"params": normalized}, jnp.sin(each)) ** 2) for each in x)

    bodies = jaxprs.fusions(jax.grad(loss, argnums=(0, 1)), params, x)
    reversing = [body for body in bodies if re.search(r"= f32\[3,3,\S* reverse\(", body)]
    assert reversing
    assert not [body for body in reversing if " transpose(" in body]


@pytest.mark.parametrize("rules", [jsn.FLAX, jsn.TORCH], ids=["FLAX", "TORCH"])
@pytest.mark.parametrize("back", [False, True])
def test_a_kernel_is_reversed_only_for_a_way_back(rules, back):
    """PyTorch's layout never: XLA has other passes for it, and nothing to gain."""
    params = {"kernel" if rules is jsn.FLAX else "weight": jnp.ones((4, 4, 3, 3))}
    state = jsn.init(params, rules=rules, block_size=2, warmup=0)
    run = lambda params: sum(map(jnp.sum, jax.tree.leaves(jsn.normalize(params, state)[0])))
    jaxpr = str(jax.make_jaxpr(jax.grad(run) if back else run)(params))
    assert (" rev[" in jaxpr) == (back and rules is jsn.FLAX)
