"""`lipschitz_bound`: never below a slope that is found, and exact where the truth is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from networks import Network, bound_model, gaussian, networks, norm, orthogonal

import jsn
from jsn import _program

NETWORKS = networks()
BOUNDS: dict[str, float] = {}


def bound(network: Network) -> float:
    if network.name not in BOUNDS:
        BOUNDS[network.name] = jsn.lipschitz_bound(network.fn, network.x)
    return BOUNDS[network.name]


def jacobians(fn, x):
    """A function that gives the Jacobian at a flat point, as a matrix."""
    flat = lambda point: jnp.concatenate(
        [jnp.ravel(y) for y in jax.tree.leaves(fn(point.reshape(x.shape)))]
    )
    return jax.jit(jax.jacfwd(flat))


def steepest_of(jacobian, x, count=24, seed=0):
    """The largest norm of a Jacobian at random points, small and large, and the point."""
    rng, best = np.random.default_rng(seed), (0.0, None)
    for i in range(count):
        point = rng.standard_normal(x.size) * (0.0, 0.1, 0.5, 1.0, 2.0, 8.0)[i % 6]
        J = np.asarray(jacobian(jnp.asarray(point, jnp.float32)), np.float64)
        if np.isfinite(J).all():
            best = max(best, (float(np.linalg.norm(J, 2)), point), key=lambda pair: pair[0])
    return best


def test_there_are_thirty():
    assert len({network.name for network in NETWORKS}) == len(NETWORKS) >= 30


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_no_jacobian_is_steeper(network):
    steepest, _ = steepest_of(jacobians(network.fn, network.x), network.x)
    assert steepest > 0
    assert bound(network) >= steepest * (1 - 1e-5)


@pytest.mark.parametrize(
    "network", [n for n in NETWORKS if n.exact is not None], ids=lambda network: network.name
)
def test_the_bound_is_the_product_where_that_is_attained(network):
    assert network.exact * (1 - 1e-7) <= bound(network) <= network.exact * (1 + 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_gradient_ascent_finds_nothing_steeper(network):
    x, jacobian = network.x, jacobians(network.fn, network.x)
    flat = lambda point: jnp.ravel(network.fn(point.reshape(x.shape)))
    along = jax.jit(jax.grad(lambda p, u, v: jnp.vdot(u, jax.jvp(flat, (p,), (v,))[1])))
    for seed in range(3):
        _, point = steepest_of(jacobian, x, seed=seed)
        point = jnp.asarray(point, jnp.float32)
        for step in range(60):
            J = np.asarray(jacobian(point), np.float64)
            U, s, V = np.linalg.svd(J)
            assert s[0] <= bound(network) * (1 + 1e-5)
            slope = along(point, jnp.asarray(U[:, 0], jnp.float32), jnp.asarray(V[0], jnp.float32))
            length = float(jnp.linalg.norm(slope))
            if not 0 < length < np.inf:
                break
            point += 0.3 * 0.95**step * slope / length


# --- what it is about -----------------------------------------------------------------------------


def test_it_is_about_the_whole_array_and_hence_about_one_example():
    A = gaussian(5, 5)
    for batch in (1, 7):
        found = jsn.lipschitz_bound(lambda x: jnp.tanh(x @ A), jnp.ones((batch, 5)))
        assert found == pytest.approx(norm(A), rel=1e-6)
    mixing = lambda x: jnp.broadcast_to(x.sum(0, keepdims=True), x.shape)
    assert jsn.lipschitz_bound(mixing, jnp.ones((4, 5))) == pytest.approx(4)


def test_values_of_x_do_not_matter_only_its_shape():
    fn = lambda x: jax.nn.relu(x) * 2
    found = [
        jsn.lipschitz_bound(fn, x)
        for x in (
            jnp.zeros(3),
            jnp.full(3, jnp.nan),
            np.ones(3, np.float32),
            jax.ShapeDtypeStruct((3,), jnp.bfloat16),
        )
    ]
    assert found == [2.0] * 4


def test_trees_count_as_one_vector():
    fn = lambda x: {"sum": x["a"] + x["b"], "b": x["b"]}
    found = jsn.lipschitz_bound(fn, {"a": jnp.ones(3), "b": jnp.ones(3)})
    assert np.sqrt((3 + np.sqrt(5)) / 2) <= found <= np.sqrt(3) + 1e-9


def test_what_does_not_depend_on_x_has_constant_0():
    assert jsn.lipschitz_bound(lambda x: jnp.ones(3), jnp.ones(3)) == 0
    assert jsn.lipschitz_bound(lambda x: 0 * x + 1, jnp.ones(3)) == 0
    assert jsn.lipschitz_bound(lambda x: x - x, jnp.ones(3)) == 0
    assert jsn.lipschitz_bound(lambda x: jnp.zeros_like(x), jnp.ones(3)) == 0


def test_weights_may_be_computed_from_other_weights():
    A = gaussian(4, 4)
    fn = lambda x: x @ jnp.linalg.qr(jnp.exp(A) + jnp.eye(4))[0]
    assert jsn.lipschitz_bound(fn, jnp.ones((2, 4))) == pytest.approx(1, rel=1e-5)


def test_an_empty_input_or_output():
    assert jsn.lipschitz_bound(lambda x: x * 2, jnp.ones((0, 3))) == 0
    assert jsn.lipschitz_bound(lambda x: x[:0], jnp.ones((2, 3))) == 0


@pytest.mark.slow
def test_a_folded_model_has_constant_1():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16), nn.relu, nn.Dense(4)])
    x = jnp.ones((2, 8))
    params = model.init(jax.random.key(0), x)["params"]
    plain = jsn.fold(params, jsn.init(params), n_steps=50)
    found = jsn.lipschitz_bound(lambda x: model.apply({"params": plain}, x), x)
    assert found == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_is_taken_for_exact(dtype):
    W = gaussian(4, 4).astype(dtype)
    found = jsn.lipschitz_bound(lambda x: jax.nn.relu(x.astype(dtype) @ W), jnp.ones((2, 4)))
    assert found == pytest.approx(norm(W.astype(jnp.float32)), rel=1e-6)


# --- the report -----------------------------------------------------------------------------------


def test_the_report_says_where_the_constant_comes_from():
    A, B = gaussian(4, 4, seed=1), gaussian(4, 4, seed=2)

    def fn(x):
        y = jax.nn.gelu(x @ A)
        return y @ B

    found, steps = jsn.lipschitz_bound(fn, jnp.ones((2, 4)), report=True)
    assert [step.primitive for step in steps] == ["dot_general", "mul", "dot_general"]
    assert [step.factor for step in steps] == pytest.approx([norm(A), 1.1289931, norm(B)], rel=1e-5)
    assert steps[-1].bound == found == pytest.approx(norm(A) * 1.1289931 * norm(B), rel=1e-5)
    first = fn.__code__.co_firstlineno
    assert [int(step.source.split(":")[1].split()[0]) - first for step in steps] == [1, 1, 2]
    assert all("test_lipschitz.py" in step.source for step in steps)


def test_the_report_names_flax_layers():
    model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
    x = jnp.ones((1, 4))
    fn = bound_model(model, x)
    _, steps = jsn.lipschitz_bound(fn, x, report=True)
    assert [step.layer.split("/")[-1] for step in steps] == ["layers_0", "layers_2"]


# --- refusals -------------------------------------------------------------------------------------

W = gaussian(4, 4)
Q = orthogonal(4, 4)


def attention(x):
    logits = (x @ W) @ (x @ Q).T
    return jax.nn.softmax(logits) @ x


def hidden_product(x):
    def body(carry, _):
        a, b = carry
        return (b, a * b), None

    return jax.lax.scan(body, (x, x + 1), None, length=2)[0][1]


@jax.custom_jvp
def wrong_rule(x):
    return x**2


wrong_rule.defjvp(lambda primals, tangents: (wrong_rule(*primals), tangents[0]))


@jax.custom_vjp
def wrong_adjoint(x):
    return jnp.exp(x)


wrong_adjoint.defvjp(lambda x: (x, None), lambda _, g: (g,))


def by_its_own_spread(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def by_another_norm(x):
    apart = x - x.mean(-1, keepdims=True)
    return x / (0.1 + jnp.sqrt(jnp.sum(apart * apart, -1, keepdims=True)))


def slice_by_x(x):
    return jax.lax.dynamic_slice(x, (x[0, 0].astype(jnp.int32), 0), (1, 4))


def loop_by_x(x):
    return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: y / 2, x)


UNBOUNDED = {
    "square": (lambda x: x * x, "mul"),
    "cube": (lambda x: x**3, "integer_pow"),
    "exp": (lambda x: jnp.exp(x), "exp"),
    "sqrt": (lambda x: jnp.sqrt(jnp.abs(x)), "sqrt"),
    "log": (lambda x: jnp.log(1 + jnp.abs(x) * 0 + x), "log"),
    "inverse": (lambda x: 1 / x, "div"),
    "attention": (attention, "dot_general"),
    "gated": (lambda x: jax.nn.sigmoid(x @ W) * (x @ Q), "mul"),
    "layer norm without floor": (by_its_own_spread, "div"),
    "by the norm of something else": (by_another_norm, "div"),
    "variance": (lambda x: x.var(-1), "square"),
    "round": (lambda x: jnp.round(x), "round"),
    "floor": (lambda x: jnp.floor(x), "floor"),
    "sign": (lambda x: jnp.sign(x), "sign"),
    "integers": (lambda x: x.astype(jnp.int32).astype(jnp.float32), "convert_element_type"),
    "bits": (lambda x: ((x.astype(jnp.int32) | 1) & 1).astype(jnp.float32), "convert_element_type"),
    "argmax": (lambda x: jnp.argmax(x, -1).astype(jnp.float32), "argmax"),
    "argsort": (lambda x: jnp.argsort(x, -1).astype(jnp.float32), "sort"),
    "jump": (lambda x: jnp.where(x > 0, x + 1, x), "gt"),
    "jump elsewhere": (lambda x: jnp.where(x > 1, x - 0.5, 0.0), "gt"),
    "jump by another entry": (lambda x: jnp.where(x[::-1] > 0, x, -x), "gt"),
    "step": (lambda x: (x > 0) * 1.0, "gt"),
    "index by x": (lambda x: x[:, jnp.argmax(x[0])], "argmax"),
    "slice by x": (slice_by_x, "convert_element_type"),
    "branch by x": (lambda x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: -y, x), "cond"),
    "while by x": (loop_by_x, "while"),
    "product in a carry": (hidden_product, "mul"),
    "straight through": (lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x), "round"),
    "stopped square": (lambda x: jax.lax.stop_gradient(x) * x, "mul"),
    "all stopped": (lambda x: jax.lax.stop_gradient(jnp.exp(x)), "exp"),
    "custom_jvp": (lambda x: wrong_rule(x), "integer_pow"),
    "custom_vjp": (lambda x: wrong_adjoint(x), "exp"),
    "inside jit": (jax.jit(lambda x: x * x), "mul"),
    "inside remat": (jax.checkpoint(lambda x: x * x), "mul"),
    "inside vmap": (jax.vmap(lambda x: jnp.outer(x, x)), "mul"),
    "complex": (lambda x: jnp.fft.fft(x).real, "convert_element_type"),
    "kernel from x": (lambda x: jnp.convolve(x[0], x[1]), "conv_general_dilated"),
    "norm squared": (lambda x: jnp.sum(x * x, -1), "mul"),
    "nan": (lambda x: x * jnp.nan, "mul"),
    "nan beyond the end": (
        lambda x: jnp.tanh(x[:2]) * jnp.take(jnp.tanh(x), jnp.asarray([0, 7]), 0),
        "mul",
    ),
    "root of what may be negative": (lambda x: jnp.sqrt(x**2 - 1), "integer_pow"),
    "added up by x": (lambda x: jax.ops.segment_sum(x, jnp.argmax(x, 1), 4), "argmax"),
    "sorted by x where constants tie": (
        lambda x: jax.lax.sort((jnp.zeros((4, 4)), x, -x), num_keys=2)[2],
        "sort",
    ),
    "chosen of three by x": (
        lambda x: jax.lax.select_n(x.astype(jnp.int32), x, 2 * x, 3 * x),
        "convert_element_type",
    ),
    "cumulative product": (lambda x: jnp.cumprod(x, -1), "cumprod"),
    "product over an axis": (lambda x: jnp.prod(x, -1), "reduce_prod"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_is_not_lipschitz_is_refused_by_name_and_line(name):
    fn, primitive = UNBOUNDED[name]
    with pytest.raises(ValueError, match="no finite Lipschitz constant is known") as error:
        jsn.lipschitz_bound(fn, jnp.ones((4, 4)))
    message = str(error.value)
    if primitive is not None:
        assert f"`{primitive}`" in message
    assert f"{__file__}:" in message


def test_a_loop_is_followed_only_so_far(monkeypatch):
    half = lambda carry: (carry[0] + 1, carry[1] / 2)
    fn = lambda x: jax.lax.while_loop(lambda carry: carry[0] < 9, half, (0, x))[1]
    monkeypatch.setattr(_program, "_MOST_ROUNDS", 10)
    assert jsn.lipschitz_bound(fn, jnp.ones(3)) == 2**-9
    monkeypatch.setattr(_program, "_MOST_ROUNDS", 9)
    with pytest.raises(ValueError, match=r"`while`.*\n.*\n.*runs too long"):
        jsn.lipschitz_bound(fn, jnp.ones(3))


def test_weights_that_are_not_finite_are_refused():
    bad = W.at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="finite"):
        jsn.lipschitz_bound(lambda x: x @ bad, jnp.ones((2, 4)))


@pytest.mark.parametrize("x", [jnp.ones(3, int), jnp.ones(3, bool), jnp.ones(3, jnp.complex64), ()])
def test_inputs_that_cannot_move_are_refused(x):
    with pytest.raises(TypeError, match="floating point"):
        jsn.lipschitz_bound(lambda x: x, x)


def test_what_is_not_used_is_not_refused():
    def fn(x):
        best = jnp.argmax(x)
        del best
        return jnp.where(True, x, x * x)

    assert jsn.lipschitz_bound(fn, jnp.ones(4)) == 1


# --- the page --------------------------------------------------------------------------------


def test_the_page_says_what_happens(capsys):
    names = pages.run("lipschitz.md")
    printed = capsys.readouterr().out
    assert names["bound"] == pytest.approx(5.411, abs=1e-3)
    assert [round(step.factor, 3) for step in names["steps"]] == [2.875, 1.129, 1.359]
    assert "1.0998\n1.0\n" in printed
    assert "because of `dot_general` of float32[4,8], float32[8,4]" in printed
