"""The public API: its names, its keywords and its defaults are a contract."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsn

INIT = {"rules": jsn.FLAX, "block_size": 32, "warmup": 15}
USE = {"n_steps": 1, "bound": 1.0, "soft": False, "scale": None}


def keywords(function) -> dict:
    """Keyword-only parameters and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jsn.init, INIT),
        (jsn.normalize, USE),
        (jsn.fold, {**USE, "n_steps": 15}),
        (jsn.sigmas, {"n_steps": 0}),
        (jsn.power_iterate, {"operator": None}),
        (jsn.linen.spectral_norm, {**INIT, **USE}),
        (jsn.nnx.spectral_norm, {**INIT, **USE}),
    ],
)
def test_keywords_and_defaults(function, expected):
    assert keywords(function) == expected


def test_every_public_function_has_an_example_and_tells_what_it_raises():
    public = [jsn.init, jsn.normalize, jsn.sigmas, jsn.fold, jsn.power_iterate, jsn.Matrix]
    public += [jsn.linen.spectral_norm, jsn.linen.init_state]
    for function in public:
        text = inspect.getdoc(function)
        assert ">>> " in text, function
        assert "Raises:" in text or function is jsn.fold, function


def test_the_state_is_a_pytree_with_static_operators():
    params = {"a": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}}
    state = jsn.init(params)
    assert state.u["a"]["bias"] is None
    assert [x.dtype for x in jax.tree.leaves(state)] == [np.float32]
    assert jax.tree.structure(state) == jax.tree.structure(jsn.init(params))
    hash(jax.tree.structure(state))


def test_init_is_deterministic():
    params = {"kernel": jax.random.normal(jax.random.key(0), (40, 30))}
    first, second = (jsn.init(params).u["kernel"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
