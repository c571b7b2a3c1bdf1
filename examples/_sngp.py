"""SNGP: a residual trunk of bounded norm, and a Gaussian process as its head.

In: pictures and labels. Out: a trained network, its probabilities, and what its trunk makes of the
pictures. Must not know what is asked of it.

References:
    Liu et al. 2020, Simple and Principled Uncertainty Estimation with Deterministic Deep Learning
    via Distance Awareness, algorithm 1 and appendix A, https://arxiv.org/abs/2006.10108. Its
    covariance weights each picture by p (1 - p); here, as for a Gaussian likelihood, by 1.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jsn

WIDTH, BOUND = 128, 0.95


# --8<-- [start:model]
class Trunk(nn.Module):
    """Residual layers; the zeros appended to `x` change no distance."""

    depth: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, WIDTH - x.shape[-1])))
        for _ in range(self.depth):
            x += nn.relu(nn.Dense(WIDTH)(x))
        return x


class Features(nn.Module):
    """Random features of a Gaussian process: cosines of fixed frequencies."""

    n: int = 512

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, key = (x.shape[-1], self.n), lambda: self.make_rng("params")
        W = self.variable("fixed", "W", lambda: jax.random.normal(key(), shape))
        b = self.variable(
            "fixed", "b", lambda: jax.random.uniform(key(), self.n, maxval=2 * jnp.pi)
        )
        return jnp.sqrt(2 / self.n) * jnp.cos(x @ W.value + b.value)


class Classifier(nn.Module):
    """Logits, and what they are a linear function of."""

    trunk: nn.Module
    gaussian_process: bool
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, length_scale: Any = 1.0) -> tuple[jax.Array, jax.Array]:
        features = self.trunk(x)
        if self.gaussian_process:
            features = Features()(features / length_scale)
        return nn.Dense(self.classes)(features), features


BoundedTrunk = jsn.linen.spectral_norm(Trunk, bound=BOUND, soft=True)
# --8<-- [end:model]

KINDS = {
    "plain, softmax": Classifier(Trunk(), gaussian_process=False),
    "jsn, softmax": Classifier(BoundedTrunk(), gaussian_process=False),
    "plain, Gaussian process": Classifier(Trunk(), gaussian_process=True),
    "jsn, Gaussian process": Classifier(BoundedTrunk(), gaussian_process=True),
}


def train(
    model: Classifier, steps: int, x: jax.Array, y: jax.Array, scale: jax.Array, key: jax.Array
) -> Any:
    """The trained variables: weights, state of jsn, and the fixed random frequencies."""
    init_key, data_key = jax.random.split(key)
    start = model.init(init_key, x[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        variables, opt_state = carry
        rows = jax.random.randint(key, (64,), 0, len(x))

        def loss(params: Any) -> tuple[jax.Array, Any]:
            now = {**variables, "params": params}
            (logits, _), new = model.apply(now, x[rows], scale, mutable=["sn_state"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    carry = (start, optimizer.init(start["params"]))
    return jax.lax.scan(step, carry, jax.random.split(data_key, steps))[0][0]


@partial(jax.jit, static_argnums=(0, 1))
def fit_and_predict(
    model: Classifier, steps: int, data: tuple, scale: jax.Array, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Probabilities of `x`, what the trunk makes of it, and its weights as it uses them.

    The head is linear, so its posterior covariance follows from one look at the training data.
    The more a picture's logits may vary, the closer they are drawn to 0 (mean-field).
    """
    variables = train(model, steps, *data, scale, key)
    logits, features = model.apply(variables, x, scale)
    if model.gaussian_process:
        _, seen = model.apply(variables, data[0], scale)
        covariance = jnp.linalg.inv(jnp.eye(seen.shape[-1]) + seen.T @ seen)
        variance = jnp.einsum("ni,ij,nj->n", features, covariance, features)
        logits /= jnp.sqrt(1 + jnp.pi / 8 * variance[:, None])
    params, trunk = variables["params"]["trunk"], Trunk(model.trunk.depth)
    if "sn_state" in variables:
        state = variables["sn_state"]["trunk"]
        params, _ = jsn.normalize(params, state, n_steps=0, bound=BOUND, soft=True)
    return nn.softmax(logits), trunk.apply({"params": params}, x), params
