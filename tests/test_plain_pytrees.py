"""Equinox modules and Haiku parameter trees go through jsn as they are."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jsn

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
HAIKU = (("/w$", jsn.Matrix()),)


def norm(W, out_axis):
    W = np.moveaxis(np.asarray(W, np.float64), out_axis, -1)
    return np.linalg.norm(W.reshape(-1, W.shape[-1]), 2)


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Equinox ----------------------------------------------------------------------------------


def equinox_model(eqx):
    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        layers: tuple
        scale: float
        name: str = eqx.field(static=True)

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.conv = eqx.nn.Conv2d(1, 4, 3, key=keys[0])
            self.norm = eqx.nn.LayerNorm(4)
            linear = eqx.nn.Linear(4, 8, use_bias=False, key=keys[1])
            self.layers = (linear, jax.nn.relu, eqx.nn.Linear(8, "scalar", key=keys[2]))
            self.scale = 3.0
            self.name = "mine"

        def __call__(self, x):
            x = self.norm(self.conv(x).mean((1, 2)))
            for layer in self.layers:
                x = layer(x)
            return self.scale * x

    return Model()


def test_an_equinox_module_goes_through_unchanged():
    eqx = pytest.importorskip("equinox")
    model = equinox_model(eqx)
    state = jsn.init(model, rules=jsn.TORCH)
    assert [path for path, _ in state.operators] == [
        "conv/weight", "layers/0/weight", "layers/2/weight",
    ]  # fmt: skip
    normalized, state = eqx.filter_jit(jsn.normalize)(model, state)
    assert jax.tree.structure(normalized) == jax.tree.structure(model)
    assert normalized.name == "mine"
    assert normalized.layers[1] is jax.nn.relu
    assert normalized.layers[0].bias is None
    assert normalized.scale == 3.0
    assert norm(normalized.conv.weight, 0) == pytest.approx(1, rel=1e-4)
    assert norm(normalized.layers[0].weight, 0) == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(normalized.conv.bias, model.conv.bias)
    np.testing.assert_array_equal(normalized.norm.weight, model.norm.weight)
    assert normalized(jnp.ones((1, 6, 6))).shape == ()


def test_equinox_parameters_with_none_in_place_of_what_is_static():
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(equinox_model(eqx), eqx.is_inexact_array)
    state = jsn.init(params, rules=jsn.TORCH)

    @jax.jit
    def loss(params, state, x):
        normalized, state = jsn.normalize(params, state)
        return eqx.combine(normalized, static)(x), state

    grads, state = jax.grad(loss, has_aux=True)(params, state, jnp.ones((1, 6, 6)))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_equinox_parameters_in_an_optimizer():
    eqx = pytest.importorskip("equinox")
    model = equinox_model(eqx)
    keep = jsn.optim.keep_spectral_norm_below(0.5, rules=jsn.TORCH)
    tx = optax.chain(optax.adam(0.1), keep)
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = eqx.filter_grad(lambda model: model(jnp.ones((1, 6, 6))))(model)
    updates, _ = tx.update(grads, tx.init(params), params)
    landed = eqx.apply_updates(model, updates)
    assert norm(landed.conv.weight, 0) <= 0.5 * (1 + 1e-4)
    assert norm(landed.layers[0].weight, 0) <= 0.5 * (1 + 1e-4)


def test_defect_equinox_inference_loses_the_sign():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
    state = jsn.init(model, rules=jsn.TORCH)
    minus = jax.tree.map(jnp.negative, model)
    positive = jsn.normalize(model, state, n_steps=0)[0].weight
    negative = jsn.normalize(minus, state, n_steps=0)[0].weight
    np.testing.assert_allclose(negative, -positive, rtol=1e-6)


def test_defect_equinox_zero_is_nan_forever():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, model)
    state = jsn.init(zero, rules=jsn.TORCH)
    for tree in (zero, zero, model):
        normalized, state = jsn.normalize(tree, state, n_steps=5)
        assert norm(normalized.weight, 0) == pytest.approx(float(tree is model), rel=1e-3)


def test_defect_equinox_a_shrunken_top_singular_value_gives_norm_831():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(6, 6, key=jax.random.key(0))
    W = jnp.diag(jnp.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5]))
    model = eqx.tree_at(lambda model: model.weight, model, W)
    state = jsn.init(model, rules=jsn.TORCH)
    model = eqx.tree_at(lambda model: model.weight, model, W.at[0, 0].set(1e-3))
    assert norm(jsn.normalize(model, state, n_steps=0)[0].weight, 0) == pytest.approx(1, rel=1e-4)


# --- Haiku ------------------------------------------------------------------------------------


def haiku_network(hk):
    def forward(x):
        x = hk.Conv2D(4, 3)(x).mean((1, 2))
        return hk.nets.MLP([8, 3], name="deep")(x)

    return hk.without_apply_rng(hk.transform(forward))


def test_a_haiku_tree_goes_through_unchanged():
    hk = pytest.importorskip("haiku")
    network, x = haiku_network(hk), jnp.ones((2, 6, 6, 1))
    with jax.numpy_rank_promotion("allow"):
        params = network.init(jax.random.key(0), x)
    state = jsn.init(params, rules=HAIKU)
    normalized, state = jax.jit(jsn.normalize)(params, state)
    assert jax.tree.structure(normalized) == jax.tree.structure(params)
    assert len(state.operators) == 3
    for name, layer in normalized.items():
        assert norm(layer["w"], -1) == pytest.approx(1, rel=1e-4)
        np.testing.assert_array_equal(layer["b"], params[name]["b"])
    with jax.numpy_rank_promotion("allow"):
        assert network.apply(normalized, x).shape == (2, 3)


@pytest.mark.parametrize("sigma", [0.02, 0.011, 0.009, 1e-20, 1e20])
def test_defect_haiku_norm_depends_on_the_scale(sigma):
    params = {"layer/~/linear": {"w": sigma * jnp.diag(jnp.array([1.0, 0.5, 0.2]))}}
    normalized, _ = jsn.normalize(params, jsn.init(params, rules=HAIKU))
    assert norm(normalized["layer/~/linear"]["w"], -1) == pytest.approx(1, rel=1e-5)


def test_defect_haiku_zero_gives_nan():
    params = {"linear": {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}}
    normalized, _ = jsn.normalize(params, jsn.init(params, rules=HAIKU))
    np.testing.assert_array_equal(normalized["linear"]["w"], np.zeros((3, 4)))


# --- the examples -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equinox", "haiku"])
def test_the_examples_keep_their_word(name):
    pytest.importorskip(name)
    pytest.importorskip("sklearn")
    with jax.numpy_rank_promotion("allow"):
        plain, accuracy = example(f"{name}_digits").train(steps=120)
    weights = [x for x in jax.tree.leaves(plain) if hasattr(x, "ndim") and x.ndim == 2]
    assert len(weights) == 3
    for W in weights:
        assert norm(W, -1) == pytest.approx(1, abs=1e-3)
    assert accuracy > 0.8
