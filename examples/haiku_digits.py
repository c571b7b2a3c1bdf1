"""A Haiku parameter tree goes through jsn unchanged: digits, with every weight of norm 1.

Run `python examples/haiku_digits.py`; it takes seconds and needs dm-haiku, optax, scikit-learn.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jsn

RULES = (("/w$", jsn.Matrix()),)
"""Haiku calls a weight `w`; its last axis is the output, for linear layers and convolutions."""


def train(steps=200):
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([128, 128, 10])(x)))
    params = network.init(jax.random.key(0), images[:1])
    sn_state = jsn.init(params, rules=RULES)
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(params)

    def loss(params, sn_state, x, y):
        normalized, sn_state = jsn.normalize(params, sn_state)
        logits = 20 * network.apply(normalized, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), sn_state

    @jax.jit
    def step(params, sn_state, opt_state, x, y):
        grads, sn_state = jax.grad(loss, has_aux=True)(params, sn_state, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), sn_state, opt_state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(0, 1500, 128)
        params, sn_state, opt_state = step(
            params, sn_state, opt_state, images[batch], labels[batch]
        )
    plain = jsn.fold(params, sn_state)  # an ordinary Haiku parameter tree
    accuracy = float((network.apply(plain, images[1500:]).argmax(-1) == labels[1500:]).mean())
    return plain, accuracy


if __name__ == "__main__":
    plain, accuracy = train()
    norms = [np.linalg.norm(np.asarray(layer["w"], np.float64), 2) for layer in plain.values()]
    print(f"accuracy {accuracy:.3f}, true norms {np.round(norms, 5)}")
    assert np.allclose(norms, 1, atol=1e-3)
    assert accuracy > 0.85
