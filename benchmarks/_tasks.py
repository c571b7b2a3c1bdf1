"""What is trained: six small tasks whose weights need a norm of 1 while they learn.

In: a seed. Out: raw parameters, data on the device, and a loss of *normalized* parameters. Must
not know how weights are normalized, or what is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

PyTree = Any


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
        params: the weights that are normalized, raw.
        extra: what is trained beside them (a generator), never normalized.
        data: arrays with one row for each example.
    """

    params: PyTree
    extra: PyTree
    data: PyTree


class Task(NamedTuple):
    """A task: `loss(normalized params, extra, batch, key)` is what Adam minimizes."""

    start: Callable[[int], Start]
    loss: Callable[[PyTree, PyTree, PyTree, jax.Array], jax.Array]
    batch_size: int = 128
    optimizer: optax.GradientTransformation = optax.adam(1e-3)


class MLP(nn.Module):
    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class Critic(nn.Module):
    """An SN-GAN critic in small: convolutions, half of them with strides, and a linear head."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for features, stride in ((32, 1), (64, 2), (64, 1), (128, 2)):
            window = 2 + stride
            x = nn.leaky_relu(nn.Conv(features, (window, window), strides=stride)(x), 0.1)
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


HIDDEN = (512, 512, 512)
GENERATOR = MLP((128, 256, 64))
LATENT = 32


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures as rows of 64 pixels in [0, 1], and their labels."""
    bunch = load_digits()
    return (bunch.data / 16).astype(np.float32), bunch.target.astype(np.int32)


def _init(model: nn.Module, key: jax.Array, x: Any) -> PyTree:
    return jax.jit(model.init)(key, x)["params"]


def _network(seed: int, outputs: int) -> PyTree:
    return _init(MLP((*HIDDEN, outputs)), jax.random.key(seed), jnp.ones((1, 64)))


def _apply(params: PyTree, x: jax.Array) -> jax.Array:
    outputs = jax.tree.leaves(params)[-2].shape[0]  # the last layer's bias
    return MLP((*HIDDEN, outputs)).apply({"params": params}, x)


def _classify(scale: float, params: PyTree, extra: PyTree, batch: PyTree, key: Any) -> jax.Array:
    del extra, key
    logits = scale * _apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def _start_digits(seed: int) -> Start:
    x, y = _digits()
    return Start(_network(seed, 10), {}, {"x": x, "y": y})


def _start_codes(seed: int) -> Start:
    """A hundred classes of real data: which of a hundred clusters a digit belongs to."""
    x, _ = _digits()
    codes = KMeans(100, n_init=1, random_state=seed).fit_predict(x)
    return Start(_network(seed, 100), {}, {"x": x, "y": codes.astype(np.int32)})


def _start_teacher(seed: int) -> Start:
    """White noise, labelled by a random network: no direction is any less useful than another."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2000, 64))
    hidden = np.maximum(x @ rng.standard_normal((64, 512)) / 8, 0)
    labels = np.argmax(hidden @ rng.standard_normal((512, 100)), axis=1)
    return Start(_network(seed, 100), {}, {"x": x.astype(np.float32), "y": labels.astype(np.int32)})


def _start_autoencoder(seed: int) -> Start:
    return Start(_network(seed, 64), {}, {"x": _digits()[0]})


def _reconstruct(params: PyTree, extra: PyTree, batch: PyTree, key: Any) -> jax.Array:
    del extra, key
    return jnp.mean((_apply(params, batch["x"]) - batch["x"]) ** 2)


def _start_critic(seed: int) -> Start:
    images = _digits()[0].reshape(-1, 8, 8, 1) * 2 - 1
    critic, generator = jax.random.split(jax.random.key(seed))
    return Start(
        _init(Critic(), critic, images[:1]),
        _init(GENERATOR, generator, jnp.ones((1, LATENT))),
        {"x": images},
    )


def _gan(params: PyTree, extra: PyTree, batch: PyTree, key: Any) -> jax.Array:
    """Hinge losses of both players at once, each blind to the gradient of the other's."""
    real = batch["x"]
    latent = jax.random.normal(key, (len(real), LATENT))
    fake = jnp.tanh(GENERATOR.apply({"params": extra}, latent)).reshape(real.shape)
    pictures = jnp.concatenate([real, jax.lax.stop_gradient(fake)])
    on_real, on_fake = jnp.split(Critic().apply({"params": params}, pictures), 2)
    critic = jnp.mean(nn.relu(1 - on_real)) + jnp.mean(nn.relu(1 + on_fake))
    frozen = jax.lax.stop_gradient(params)
    return critic - jnp.mean(Critic().apply({"params": frozen}, fake))


TASKS = {
    "digits": Task(_start_digits, functools.partial(_classify, 1.0)),
    "digits_20": Task(_start_digits, functools.partial(_classify, 20.0)),
    "codes": Task(_start_codes, functools.partial(_classify, 20.0)),
    "autoencoder": Task(_start_autoencoder, _reconstruct),
    "critic": Task(_start_critic, _gan, 32, optax.adam(1e-3, b1=0.5, b2=0.9)),
    "teacher": Task(_start_teacher, functools.partial(_classify, 20.0)),
}
