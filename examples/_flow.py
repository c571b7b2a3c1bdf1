"""The residual flow of `residual_flow.py`: its blocks, their log determinants, and its training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsn

N_BLOCKS, WIDTH, N_SURE, KEEP, ROUNDS = 8, 64, 3, 0.75, 100


# --8<-- [start:model]
def lip_swish(x: jax.Array) -> jax.Array:
    """A swish whose slope is 1 at most; steep, so that it bends within the data."""
    return nn.swish(5 * x) / 5.5


class Branch(nn.Module):
    """g of a block x + g(x)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = partial(nn.Dense, bias_init=nn.initializers.normal(0.5))
        y = lip_swish(layer(WIDTH)(x))
        return nn.Dense(x.shape[-1])(lip_swish(layer(WIDTH)(y)))


# The kernels of all blocks are stacked: one more axis, and a sigma for each entry of it.
rules = ((r"kernel$", jsn.Matrix(batch_axis=0)),)


def constrain(params: Any, sn_state: Any, c: Any, n_steps: int = 1) -> tuple[Any, Any]:
    """Three layers of norm c^(1/3): each branch has the constant c."""
    return jsn.normalize(params, sn_state, bound=c ** (1 / 3), n_steps=n_steps)


# --8<-- [end:model]


# --8<-- [start:roulette]
def block(g: Callable, weights: Any, x: jax.Array, key: jax.Array, keep: Any) -> tuple:
    """X + g(x), and an estimate of log |det(1 + J)| for each example, whose gradient is one too.

    log det(1 + J) = tr J - tr J^2 / 2 + tr J^3 / 3 - ..., and a trace is the mean of v J v over
    random v. The first terms are always there. After each, roulette goes on with probability
    `keep`; what is there is divided by the probability of getting there.
    """
    v_key, stop_key = jax.random.split(key)
    v = jax.random.rademacher(v_key, x.shape, x.dtype)
    n_terms = N_SURE + jax.random.geometric(stop_key, 1 - keep) - 1
    frozen, at = jax.lax.stop_gradient((weights, x))
    vector_jacobian = lambda w: jax.vjp(partial(g, frozen), at)[1](w)[0]

    def add(k: jax.Array, carry: tuple) -> tuple:
        w, log_series, inverse = carry  # v J^k; the series of v log(1 + J); that of v / (1 + J)
        weight = (-1.0) ** k / keep ** jnp.maximum(0, k - N_SURE + 1)
        inverse += weight * w
        w = vector_jacobian(w)
        return w, log_series + weight / (k + 1) * w, inverse

    _, log_series, inverse = jax.lax.fori_loop(0, n_terms, add, (v, 0 * v, 0 * v))
    y, jv = jax.jvp(partial(g, weights), (x,), (v,))
    slope = (inverse * jv).sum(-1)  # counts by its gradient alone: that of the log determinant
    return x + y, (log_series * v).sum(-1) + slope - jax.lax.stop_gradient(slope)


# --8<-- [end:roulette]


def exact_block(g: Callable, weights: Any, x: jax.Array, *_: Any) -> tuple[jax.Array, jax.Array]:
    """X + g(x), and log |det(1 + J)|, by way of J."""
    one = lambda x: x + g(weights, x)
    return one(x), jnp.linalg.slogdet(jax.vmap(jax.jacfwd(one))(x))[1]


def branch(weights: Any, x: jax.Array) -> jax.Array:
    return Branch().apply(weights, x)


def affine(block: Any, x: jax.Array) -> jax.Array:
    return x * jnp.exp(block["log_scale"]) + block["shift"]


def forward(run: Callable, blocks: Any, x: jax.Array, key: Any, keep: Any = KEEP) -> tuple:
    """The code of x, and the log density; `run` is `block` or `exact_block`."""

    def step(x: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        one, key = at
        x, log_det = run(branch, one["branch"], affine(one, x), key, keep)
        return x, log_det + one["log_scale"].sum()

    z, log_dets = jax.lax.scan(step, x, (blocks, jax.random.split(key, N_BLOCKS)))
    return z, log_dets.sum(0) - 0.5 * (z**2 + jnp.log(2 * jnp.pi)).sum(-1)


def backward(blocks: Any, z: jax.Array, rounds: int = ROUNDS) -> jax.Array:
    """What has the code z, by fixed-point iteration of each block."""

    def step(y: jax.Array, one: Any) -> tuple[jax.Array, None]:
        x = jax.lax.fori_loop(0, rounds, lambda _, x: y - branch(one["branch"], x), y)
        return (x - one["shift"]) * jnp.exp(-one["log_scale"]), None

    return jax.lax.scan(step, z, blocks, reverse=True)[0]


def train(data: jax.Array, c: Any, keep: Any, steps: int, key: jax.Array) -> Any:
    """Maximum likelihood by Adam; the blocks as the flow uses them come back."""
    init_key, key = jax.random.split(key)
    branches = jax.vmap(Branch().init, (0, None))(jax.random.split(init_key, N_BLOCKS), data[:1])
    zeros = jnp.zeros((N_BLOCKS, data.shape[-1]))
    params = {"branch": branches, "log_scale": zeros, "shift": zeros}
    sn_state = jsn.init(params, rules=rules)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, sn_state, opt_state = carry
        rows_key, key = jax.random.split(key)
        x = data[jax.random.randint(rows_key, (128,), 0, len(data))]

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            blocks, new = constrain(params, sn_state, c)
            return -forward(block, blocks, x, key, keep)[1].mean(), new

        grads, new = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), new, opt_state), None

    carry = (params, sn_state, optimizer.init(params))
    params, sn_state, _ = jax.lax.scan(step, carry, jax.random.split(key, steps))[0]
    return constrain(params, sn_state, c, n_steps=15)[0]


def inversion(blocks: Any, x: jax.Array) -> jax.Array:
    """After each round, what is left of the first error: the worst block and point."""

    def step(x: jax.Array, one: Any) -> tuple[jax.Array, jax.Array]:
        x = affine(one, x)
        y = x + branch(one["branch"], x)

        def improve(found: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            error = jnp.linalg.norm(found - x, axis=-1).max()
            return y - branch(one["branch"], found), error

        return y, jax.lax.scan(improve, y, length=ROUNDS)[1]

    errors = jax.lax.scan(step, x, blocks)[1]
    return (errors / errors[:, :1]).max(0)


def prove(blocks: Any) -> float:
    """A proven constant of the worst branch: its layers' bounds, and the slope of lip_swish."""
    kernels = [blocks["branch"]["params"][f"Dense_{i}"]["kernel"] for i in range(3)]
    layers = [jsn.upper_bound(kernel, operator=jsn.Matrix(batch_axis=0)) for kernel in kernels]
    return float(np.prod(layers, axis=0).max() * jsn.lipschitz_bound(lip_swish, jnp.ones(1)) ** 2)
