"""The promises of the design as properties, on trees that hypothesis draws.

Each example draws the spectra, scales and states of a few trees whose shapes are fixed, so that
few programs are compiled. By default the same few examples are drawn on every run; the slow
variant of each test draws others every time, and many more.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matrices import assert_converged, true_norm, with_spectrum

import jsn
from jsn import Conv, Matrix

pytestmark = pytest.mark.slow  # minutes in all; what they promise is also tested in the small

BLOCK = 6
# Ranks 2 to 4, several input axes, outputs in the middle, a stack, a convolution, bfloat16.
SHAPES = {
    "dense/kernel": (12, 8),
    "head/weight": (4, 5, 8),
    "stack/kernel": (3, 8, 12),
    "conv/kernel": (3, 3, 2, 8),
    "half/kernel": (12, 8),
    "row/kernel": (1, 12),
}
VIEWS = {
    "dense/kernel": Matrix(),
    "head/weight": Matrix(in_axis=(0, 2), out_axis=1),
    "stack/kernel": Matrix(batch_axis=0),
    "conv/kernel": Conv((6, 6, 2)),
    "half/kernel": Matrix(),
    "row/kernel": Matrix(),
}
KINDS = ("gaussian", "rank_one", "tied", "gap", "zero", "ones", "steep", "sparse")


def rules(names=lambda module: module):
    """Rules for the tree, or for one whose modules have other names."""
    parts = {path: path.split("/") for path in SHAPES}
    return tuple((f"^{names(a)}/{b}$", VIEWS[path]) for path, (a, b) in parts.items())


def holds(n, *strategies):
    """A test that a property holds for `n` examples, always the same, and for 25 times as many."""

    def decorate(check):
        @pytest.mark.parametrize("count", [n, 25 * n])
        def test(count):
            settings = hypothesis.settings(
                max_examples=count,
                derandomize=count == n,
                print_blob=True,
                database=None,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            settings(hypothesis.given(*strategies)(check))()

        test.__doc__ = check.__doc__
        return test

    return decorate


def matrix(kind, seed, n, m):
    """A matrix with a spectrum of this kind."""
    rng, k = np.random.default_rng(seed), min(n, m)
    values = {
        "rank_one": [1.0],
        "tied": np.ones(k),
        "gap": [2.0, *np.linspace(1, 0.1, k - 1)],
        "steep": 10.0 ** -np.linspace(0, 10, k),
    }
    if kind in values:
        return with_spectrum(seed, n, m, values[kind])
    if kind in ("zero", "ones"):
        return np.full((n, m), float(kind == "ones"))
    return rng.standard_normal((n, m)) * (rng.random((n, m)) < (0.3 if kind == "sparse" else 1))


@st.composite
def trees(draw, most=60):
    """Parameters of `SHAPES`, each weight of any kind and scale."""
    tree = {}
    for path, shape in SHAPES.items():
        kind, seed = draw(st.sampled_from(KINDS), label=path), draw(st.integers(0, 2**20))
        W = matrix(kind, seed, int(np.prod(shape[:-1])), shape[-1])
        W = (W * 2.0 ** draw(st.integers(-most, most))).reshape(shape)
        module, name = path.split("/")
        dtype = jnp.bfloat16 if module == "half" else jnp.float32
        tree[module] = {name: jnp.asarray(W, dtype), "bias": jnp.ones(5)}
    return tree


init = jax.jit(functools.partial(jsn.init, rules=rules(), block_size=BLOCK))
normalize = jax.jit(jsn.normalize, static_argnames=("n_steps", "soft"))
sigmas = jax.jit(functools.partial(jsn.sigmas, n_steps=1))


def weights(tree):
    """The weights of a tree, by path, in numpy."""
    parts = {path: path.split("/") for path in SHAPES}
    return {path: np.asarray(tree[module][name]) for path, (module, name) in parts.items()}


def norms(path, W):
    """The true norms of a weight, one for each entry of its batch axes, in float64."""
    W = W.astype(np.float64)
    if path == "stack/kernel":
        return np.array([true_norm(x) for x in W])
    if path == "conv/kernel":
        units = np.eye(72).reshape(72, 6, 6, 2)
        units = np.pad(units, [(0, 0), (1, 1), (1, 1), (0, 0)])
        taps = [(i, j) for i in range(3) for j in range(3)]
        W = sum(units[:, i : i + 6, j : j + 6] @ W[i, j] for i, j in taps).reshape(72, -1)
    return true_norm(W.transpose(0, 2, 1) if path == "head/weight" else W)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, atol=1e-5):
    """Equal up to rounding, for normalized weights: their entries are at most 1."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        most = 2.0**-7 if x.dtype == jnp.bfloat16 else atol
        x, y = (np.asarray(z).astype(np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=most)


# --- what comes out -----------------------------------------------------------------------------


@holds(10, trees())
def test_raw_weights_structure_and_all_else_stay(params):
    copy, state = jax.tree.map(np.array, params), init(params)
    normalized, new = normalize(params, state)
    assert_same(params, copy)
    assert jax.tree.map(jnp.shape, normalized) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.result_type, normalized) == jax.tree.map(jnp.result_type, params)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(new))
    assert all(np.isfinite(W.astype(np.float32)).all() for W in weights(normalized).values())
    for tree in normalized.values():
        assert_same(tree["bias"], jnp.ones(5))


@holds(10, trees())
def test_the_estimate_is_at_most_the_truth_and_the_truth_at_most_the_bound(params):
    found = weights(sigmas(params, init(params)))
    for path, W in weights(params).items():
        truth = norms(path, W)
        assert_converged(found[path], truth, rtol=2e-3)
        bound = jsn.upper_bound(W, operator=VIEWS[path])
        assert np.all(bound >= truth * (1 - 1e-13))
        if path != "conv/kernel":  # whose bound holds for inputs of every size
            assert np.all(bound <= truth * (1 + 1e-6))


@holds(10, trees(), st.floats(0.01, 100.0), st.booleans())
def test_the_norm_is_the_bound_or_at_most_that(params, bound, soft):
    normalized, _ = normalize(params, init(params), bound=bound, soft=soft)
    for path, W in weights(normalized).items():
        raw = norms(path, weights(params)[path])
        expected = np.minimum(raw, bound) if soft else np.where(raw > 0, bound, 0)
        rtol = 2.0**-6 if W.dtype == jnp.bfloat16 else 2e-3
        np.testing.assert_allclose(norms(path, W), expected, rtol=rtol)


@holds(6, trees(most=30), st.integers(-60, 60))
def test_a_scale_changes_nothing(params, exponent):
    grown = {
        module: {name: x if name == "bias" else x * 2.0**exponent for name, x in tree.items()}
        for module, tree in params.items()
    }
    assert_close(normalize(grown, init(grown))[0], normalize(params, init(params))[0], atol=1e-6)


@holds(6, trees())
def test_steps_add_up(params):
    first = state = init(params)
    for _ in range(3):
        one_by_one, state = normalize(params, state)
    assert_close(normalize(params, first, n_steps=3)[0], one_by_one)


@holds(6, trees())
def test_normalizing_what_is_normalized_changes_nothing(params):
    _, state = normalize(params, init(params), n_steps=3)
    once, state = normalize(params, state, n_steps=3)
    assert_close(normalize(once, state, n_steps=3)[0], once, atol=1e-4)


# --- how it is run ------------------------------------------------------------------------------

TURNED = dict(zip(sorted(p.split("/")[0] for p in SHAPES), "zyxwvu", strict=True))
"""Other names, in the opposite order."""
init_turned = jax.jit(functools.partial(jsn.init, rules=rules(TURNED.get), block_size=BLOCK))


@holds(6, trees())
def test_names_and_order_mean_nothing(params):
    turned = {TURNED[module]: tree for module, tree in params.items()}
    expected, _ = normalize(params, init(params))
    found, _ = normalize(turned, init_turned(turned))
    assert_close({module: found[TURNED[module]] for module in params}, expected)


@holds(4, trees())
def test_jit_changes_nothing(params):
    """Two weights will do: eagerly, each operation is compiled for itself."""
    few, state = {module: params[module] for module in ("dense", "stack")}, init(params)
    operators = tuple((path, VIEWS[path]) for path in ("dense/kernel", "stack/kernel"))
    state = jsn.SNState({module: state.u[module] for module in few}, operators)
    assert_close(jsn.normalize(few, state)[0], normalize(few, state)[0])


@holds(4, st.tuples(trees(), trees(), trees()))
def test_vmap_is_a_loop(members):
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    state = jax.tree.map(lambda *xs: jnp.stack(xs), *map(init, members))
    found, new = vmapped(params, state)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    for i, member in enumerate(members):
        one = jax.tree.map(lambda x, i=i: x[i], found)
        assert_close(one, normalize(member, init(member))[0])


vmapped = jax.jit(jax.vmap(jsn.normalize))

LAYOUTS = {
    "inputs": (P("x"), P("x"), P(None, "x"), P(), P("x"), P()),
    "outputs": (P(None, "x"), P(), P(None, None, "x"), P(None, None, None, "x"), P(), P(None, "x")),
}


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@holds(6, trees(), st.sampled_from(sorted(LAYOUTS)))
def test_shardings_mean_nothing(params, layout):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    placed = jax.tree.map(lambda x: x, params)
    for path, spec in zip(SHAPES, LAYOUTS[layout], strict=True):
        module, name = path.split("/")
        placed[module][name] = jax.device_put(placed[module][name], NamedSharding(mesh, spec))
    state = init(params)
    everywhere = jax.device_put(state, NamedSharding(mesh, P()))
    assert_close(normalize(placed, everywhere)[0], normalize(params, state)[0])
