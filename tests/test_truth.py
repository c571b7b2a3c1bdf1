"""The promise: during training, the operator norm is the bound.

A digits MLP trains with the tracker in the loop, and the true norm of every normalized layer is
taken along the way, by float64 eigenvalues. Flax's own wrapper, on this task: median 1.115,
maximum 1.391 (benchmarks/truth.py measures it beside jsn, on more tasks and seeds).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jsn

SIZES = (64, 512, 512, 512, 10)
STEPS, EVERY, SETTLED = 300, 10, 50


def largest_singular_value(W) -> float:
    W = np.asarray(W, np.float64)
    gram = W.T @ W if W.shape[0] > W.shape[1] else W @ W.T
    return float(np.sqrt(np.linalg.eigvalsh(gram)[-1]))


def forward(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"])
    return x @ last["kernel"]


@functools.cache
def worst_layers(block_size: int) -> np.ndarray:
    """The worst layer's true norm at every EVERY-th step after SETTLED."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    params = {
        f"Dense_{i}": {"kernel": jax.random.normal(key, (n, m)) / np.sqrt(n)}
        for i, (key, n, m) in enumerate(zip(keys[:-1], SIZES, SIZES[1:], strict=False))
    }
    optimizer = optax.adam(1e-3)

    def loss(params, state, rows):
        normalized, state = jsn.normalize(params, state)
        logits = forward(normalized, images[rows])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return each.mean(), (normalized, state)

    def step(carry, key):
        params, state, moments = carry
        rows = jax.random.randint(key, (128,), 0, len(images))
        grads, (normalized, state) = jax.grad(loss, has_aux=True)(params, state, rows)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), state, moments), normalized

    @jax.jit
    def chunk(carry, keys):
        carry, _ = jax.lax.scan(lambda carry, key: (step(carry, key)[0], None), carry, keys[1:])
        return step(carry, keys[0])

    carry = (params, jsn.init(params, block_size=block_size), optimizer.init(params))
    worst = []
    for t, chunk_keys in enumerate(jax.random.split(keys[-1], (STEPS // EVERY, EVERY))):
        carry, normalized = chunk(carry, chunk_keys)
        if (t + 1) * EVERY > SETTLED:
            worst.append(max(map(largest_singular_value, jax.tree.leaves(normalized))))
    return np.array(worst)


@pytest.mark.parametrize(("block_size", "median", "maximum"), [(32, 1.002, 1.01), (8, 1.02, 1.07)])
def test_the_worst_layer_stays_at_the_bound_in_training(block_size, median, maximum):
    worst = worst_layers(block_size)
    assert np.median(worst) <= median
    assert worst.max() <= maximum
    assert worst.min() >= 1 - 1e-6  # sigma is never above the truth, so the norm never below 1


def test_one_vector_misses_what_a_block_keeps():
    """The test above can fail: with one vector it does, by far."""
    assert worst_layers(1).max() > 1.07
