"""One training step of everything, in each mode that JAX offers for finding mistakes.

`make reliability ARGS='--only modes'` runs the core tests in these modes; this is their essence.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matrices import gaussian, true_norm

import jsn

pytestmark = pytest.mark.slow  # minutes in all; what they promise is also tested in the small

MODES = {
    "default": contextlib.nullcontext,
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "check_tracer_leaks": jax.checking_leaks,
}
PARAMS = {
    "dense": {"kernel": gaussian(0, 12, 8), "bias": np.ones(8, np.float32)},
    "half": {"kernel": gaussian(1, 12, 8).astype(jnp.bfloat16)},
    "conv": {"kernel": gaussian(2, 3, 3, 2, 5)},
    "zero": {"kernel": np.zeros((12, 8), np.float32)},
}
RULES = (("conv/kernel", jsn.Conv((6, 6, 2))), *jsn.FLAX)


def train(params, state, n_steps=1):
    """A step of gradient descent on the normalized weights."""

    def loss(params):
        normalized, new = jsn.normalize(params, state, n_steps=n_steps, scale=2.0)
        squares = [jnp.sum(jnp.square(W.astype(jnp.float32))) for W in jax.tree.leaves(normalized)]
        return sum(squares), (new, normalized)

    slope, (state, normalized) = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - g.astype(p.dtype), params, slope), state, normalized


@pytest.mark.parametrize("mode", MODES)
def test_plain_pytrees(mode):
    step = jax.jit(lambda *args: train(*args))  # a new function: traced in this mode
    with MODES[mode]():
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = jsn.init(params, rules=RULES, block_size=4)
        params, state, _ = step(params, state)
        params, state, normalized = step(params, state)
    assert abs(true_norm(normalized["dense"]["kernel"]) / 2 - 1) < 2e-3
    assert abs(true_norm(normalized["half"]["kernel"]) / 2 - 1) < 1e-2
    assert not np.any(normalized["zero"]["kernel"])
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(state))


@jsn.linen.spectral_norm(block_size=4)
class Net(nn.Module):
    """A network as users write them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3,))(x[..., None]))
        return nn.Dense(3)(x.reshape(len(x), -1))


X = gaussian(3, 4, 6)
# Not Adam, which itself does not run under strict promotion.
OPTIMIZER = optax.chain(optax.sgd(1e-2, momentum=0.9), jsn.optim.keep_spectral_norm_below(2.0))


def train_net(variables, moments):
    def loss(params):
        y, new = Net().apply({**variables, "params": params}, X, mutable=["sn_state"])
        return jnp.mean(jnp.square(y)), new

    slope, new = jax.grad(loss, has_aux=True)(variables["params"])
    change, moments = OPTIMIZER.update(slope, moments, variables["params"])
    return {"params": optax.apply_updates(variables["params"], change), **new}, moments


@pytest.mark.parametrize("mode", MODES)
def test_linen_and_optax(mode):
    step = jax.jit(lambda *args: train_net(*args))
    with MODES[mode]():
        variables = Net().init(jax.random.key(0), X)
        moments = OPTIMIZER.init(variables["params"])
        for _ in range(2):
            variables, moments = step(variables, moments)
        folded = jsn.fold(variables["params"], variables["sn_state"])
    assert abs(true_norm(folded["Dense_0"]["kernel"]) - 1) < 1e-3


def test_without_jit():
    """A small weight: operation by operation, each is dispatched for itself."""
    params = {"kernel": jnp.asarray(gaussian(0, 12, 8))}
    with jax.disable_jit():
        state = jsn.init(params, block_size=4, warmup=3)
        _, state, normalized = train(params, state, 2)
    assert abs(true_norm(normalized["kernel"]) / 2 - 1) < 1e-2
