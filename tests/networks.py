"""Thirty functions to bound, with the constant that can be computed by hand where it is attained.

`STEEP` functions have their constant from the norms of their weights and of their activations,
not from anything of jsn's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

GELU, GELU_TANH = 1.1289041451851547863, 1.1289930686587717655
SILU, MISH, SELU = 1.0998393201288669170, 1.0884981612517278612, 1.7580993408473768599
"""Largest slopes, from 40 digits of mpmath."""


class Network(NamedTuple):
    """A function, an example of its input, and its constant if that is known and attained."""

    name: str
    fn: Callable
    x: jax.Array
    exact: float | None = None


def orthogonal(rows: int, columns: int, seed: int = 0) -> jnp.ndarray:
    """A matrix whose singular values are 1."""
    n = max(rows, columns)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    return jnp.asarray(Q[:rows, :columns], jnp.float32)


def gaussian(*shape: int, seed: int = 0) -> jnp.ndarray:
    """A Gaussian weight of about unit norm."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x / np.sqrt(shape[-1]), jnp.float32)


def norm(W) -> float:
    """The largest singular value, by numpy in float64."""
    return float(np.linalg.norm(np.asarray(W, np.float64), 2))


class Block(nn.Module):
    """A residual block as in ResNet, in evaluation."""

    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=True)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), use_bias=False)(x)
        return nn.relu(x + y)


def _group_sort(x):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return jnp.sort(pairs, axis=-1).reshape(x.shape)


def _max_min(x):
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1)


def bound_model(model: nn.Module, x: jax.Array, seed: int = 0) -> Callable:
    """A linen model as a function of its input, every variable random."""
    variables = model.init(jax.random.key(seed), x)
    rng = np.random.default_rng(seed)

    def away(leaf):
        return leaf if leaf.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    variables = jax.tree.map(away, variables)
    return lambda x: model.apply(variables, x)


def networks() -> list[Network]:
    """The table."""
    x, image = jnp.ones((2, 6)), jnp.ones((1, 6, 6, 2))
    A, B = gaussian(6, 6, seed=1), gaussian(6, 6, seed=2)
    Q, R = orthogonal(6, 6, 1), orthogonal(6, 6, 2)
    row, sequence = jnp.ones((1, 6)), jnp.ones((1, 3, 2))
    convolutions = nn.Sequential([nn.Conv(3, (3, 3)), nn.relu, nn.Conv(2, (3, 3), 2)])
    pooled = nn.Sequential([nn.Conv(3, (3, 3)), lambda x: nn.max_pool(x, (3, 3), (2, 2))])
    mlp = nn.Sequential([nn.Dense(8), nn.gelu, nn.Dense(8), nn.tanh, nn.Dense(3)])
    leak = float(np.float32(1.7))
    return [
        Network("linear", lambda x: x @ A, x, norm(A)),
        Network("two linear", lambda x: (x @ Q) @ A, x, norm(A)),
        Network("relu, orthogonal", lambda x: 3 * jax.nn.relu(x @ Q) @ R, x, 3.0),
        Network("relu", lambda x: jax.nn.relu(x @ A) @ B, x),
        Network("leaky relu", lambda x: jax.nn.leaky_relu(x @ Q, 1.7) @ R, x, leak),
        Network("tanh", lambda x: jnp.tanh(x @ Q) @ A, x, norm(A)),
        Network("sigmoid", lambda x: jax.nn.sigmoid(x @ A), x, norm(A) / 4),
        Network("softplus", lambda x: jax.nn.softplus(x @ Q), x, 1.0),
        Network("elu", lambda x: jax.nn.elu(x @ A, 1.0), x, norm(A)),
        Network("gelu", lambda x: jax.nn.gelu(x * 1.0, approximate=False), x, GELU),
        Network("gelu tanh", lambda x: jax.nn.gelu(2 * x), x, 2 * GELU_TANH),
        Network("silu", lambda x: jax.nn.silu(x), x, SILU),
        Network("mish", lambda x: jax.nn.mish(x), x, MISH),
        Network("selu", lambda x: jax.nn.selu(x), x, SELU),
        Network("hard swish", lambda x: jax.nn.hard_swish(x), x, 1.5),
        Network("softmax", lambda x: jax.nn.softmax(x), jnp.ones((3, 2)), 0.5),
        Network("softmax, logits", lambda x: jax.nn.softmax(x @ A), x),
        Network("log-softmax", lambda x: jax.nn.log_softmax(x), x),
        Network("logsumexp", lambda x: jax.nn.logsumexp(x, axis=-1), x, 1.0),
        Network("residual", lambda x: x + 0.5 * jax.nn.relu(x), x, 1.5),
        Network("residual, two layers", lambda x: x + jax.nn.relu(x @ A) @ B, x),
        Network("group sort", lambda x: _group_sort(x @ Q) @ R, x, 1.0),
        Network("max and min", lambda x: _max_min(x @ Q) @ R, x, 1.0),
        Network("layer norm", bound_model(nn.LayerNorm(epsilon=0.25), x), x),
        Network(
            "rms norm", lambda x: nn.RMSNorm(epsilon=0.25, use_scale=False).apply({}, x), x, 2.0
        ),
        Network("convolutions", bound_model(convolutions, image), image),
        Network("pooled", bound_model(pooled, image), image),
        Network("average", lambda x: nn.avg_pool(x, (2, 2), (2, 2)).mean((1, 2)), image, 1 / 6),
        Network("residual block", bound_model(Block(3), image), image),
        Network("recurrent", bound_model(nn.RNN(nn.SimpleCell(3)), sequence), sequence),
        Network("lstm", bound_model(nn.RNN(nn.LSTMCell(2)), sequence), sequence),
        Network("mlp", bound_model(mlp, row), row),
    ]
