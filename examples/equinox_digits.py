"""An Equinox module goes through jsn unchanged: digits, with every weight of norm 1.

Run `python examples/equinox_digits.py`; it takes seconds and needs equinox, optax, scikit-learn.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jsn


def train(steps=200):
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
    # Equinox has PyTorch's layout. Static fields, Nones and functions pass through.
    sn_state = jsn.init(model, rules=jsn.TORCH)
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    def loss(model, sn_state, x, y):
        normalized, sn_state = jsn.normalize(model, sn_state)
        logits = 20 * jax.vmap(normalized)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), sn_state

    @eqx.filter_jit
    def step(model, sn_state, opt_state, x, y):
        (_, sn_state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, sn_state, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), sn_state, opt_state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(0, 1500, 128)
        model, sn_state, opt_state = step(model, sn_state, opt_state, images[batch], labels[batch])
    plain = jsn.fold(model, sn_state)  # an ordinary eqx.nn.MLP
    accuracy = float((jax.vmap(plain)(images[1500:]).argmax(-1) == labels[1500:]).mean())
    return plain, accuracy


if __name__ == "__main__":
    plain, accuracy = train()
    norms = [np.linalg.norm(np.asarray(layer.weight, np.float64), 2) for layer in plain.layers]
    print(f"accuracy {accuracy:.3f}, true norms {np.round(norms, 5)}")
    assert np.allclose(norms, 1, atol=1e-3)
    assert accuracy > 0.85
