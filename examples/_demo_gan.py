"""The GAN of the demo: two networks and one training step. All that has to do with jsn is here.

In: batches of digits. Out: the players after one more step, and the critic's loss. Must not know:
how pictures are judged, tables and figures.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _demo_judge import N_CLASSES, Digits

import jsn

CRITIC_LAYERS = ("conv_1", "conv_2", "conv_3", "head")


class Settings(NamedTuple):
    """The same for both runs."""

    steps: int
    seed: int = 0
    critic_learning_rate: float = 3e-2
    generator_learning_rate: float = 2e-3
    beta1: float = 0.0
    beta2: float = 0.99
    batch_size: int = 64
    noise_size: int = 32

    def adam(self, learning_rate: float) -> optax.GradientTransformation:
        return optax.adam(learning_rate, self.beta1, self.beta2)


class Players(NamedTuple):
    """Everything that training changes. `sn_state` is None where the critic is plain."""

    generator: Any
    generator_opt: Any
    critic: Any
    critic_opt: Any
    sn_state: Any


class Batch(NamedTuple):
    """What one step draws: real pictures, their labels, and noise for each player's turn."""

    images: jax.Array
    labels: jax.Array
    critic_noise: jax.Array
    generator_noise: jax.Array


# --- The two networks --------------------------------------------------------------------------


@jsn.linen.spectral_norm
class Critic(nn.Module):
    """Scores pictures: high where one looks like a real picture of the digit in `labels`."""

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        planes = jax.nn.one_hot(labels, N_CLASSES)[:, None, None, :]
        planes = jnp.broadcast_to(planes, (*images.shape[:3], N_CLASSES))
        x = jnp.concatenate([images, planes], axis=-1)
        x = nn.leaky_relu(nn.Conv(16, (3, 3), name="conv_1")(x), 0.1)
        x = nn.leaky_relu(nn.Conv(32, (4, 4), strides=2, name="conv_2")(x), 0.1)
        x = nn.leaky_relu(nn.Conv(64, (4, 4), strides=2, name="conv_3")(x), 0.1)
        return nn.Dense(1, name="head")(x.reshape(len(x), -1))[:, 0]


PlainCritic = Critic.__wrapped__
"""The same class without the decorator, to be given weights as they shall be used."""


class Generator(nn.Module):
    """Draws pictures of the digits in `labels` from noise."""

    @nn.compact
    def __call__(self, noise: jax.Array, labels: jax.Array) -> jax.Array:
        x = jnp.concatenate([noise, jax.nn.one_hot(labels, N_CLASSES)], axis=-1)
        x = nn.relu(nn.Dense(2 * 2 * 64)(x)).reshape(len(x), 2, 2, 64)
        x = nn.ConvTranspose(32, (4, 4), strides=(2, 2))(x)
        x = nn.relu(nn.GroupNorm(4)(x))
        x = nn.ConvTranspose(16, (4, 4), strides=(2, 2))(x)
        x = nn.relu(nn.GroupNorm(4)(x))
        return jnp.tanh(nn.Conv(1, (3, 3))(x))


@partial(jax.jit, static_argnames="settings")
def init_players(settings: Settings) -> Players:
    """Draws the initial weights. The critic's are those of the undecorated class."""
    generator_key, critic_key = jax.random.split(jax.random.key(settings.seed))
    images, labels = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, dtype=int)
    noise = jnp.zeros((1, settings.noise_size))
    generator = Generator().init(generator_key, noise, labels)["params"]
    variables = Critic().init(critic_key, images, labels)
    return Players(
        generator=generator,
        generator_opt=settings.adam(settings.generator_learning_rate).init(generator),
        critic=variables["params"],
        critic_opt=settings.adam(settings.critic_learning_rate).init(variables["params"]),
        sn_state=variables["sn_state"],
    )


# --- Where jsn comes in: plain and normalized critic differ in these two functions --------------


def critic_weights(params: Any, sn_state: Any, n_steps: int = 1) -> tuple[Any, Any]:
    """The weights to compute with and the next state; a plain critic computes with `params`."""
    if sn_state is None:
        return params, None
    return jsn.normalize(params, sn_state, n_steps=n_steps)


def frozen_critic(players: Players) -> Callable[..., jax.Array]:
    """The critic as a function to evaluate. With jsn: `sn_state` is read, not updated."""
    if players.sn_state is None:
        return partial(PlainCritic().apply, {"params": players.critic})
    return partial(Critic().apply, {"params": players.critic, "sn_state": players.sn_state})


# --- One training step -------------------------------------------------------------------------


@partial(jax.jit, static_argnames="settings")
def train_step(
    players: Players, digits: Digits, step: int, settings: Settings
) -> tuple[Players, jax.Array]:
    """One turn of each player. The batch depends on seed and step alone, so both runs share it."""
    batch = draw_batch(digits, step, settings)
    players, critic_loss = train_critic(players, batch, settings)
    return train_generator(players, batch, settings), critic_loss


def draw_batch(digits: Digits, step: int, settings: Settings) -> Batch:
    key = jax.random.fold_in(jax.random.key(settings.seed), step)
    row_key, critic_key, generator_key = jax.random.split(key, 3)
    rows = jax.random.randint(row_key, (settings.batch_size,), 0, len(digits.labels))
    noise_shape = (settings.batch_size, settings.noise_size)
    return Batch(
        images=digits.images[rows],
        labels=digits.labels[rows],
        critic_noise=jax.random.normal(critic_key, noise_shape),
        generator_noise=jax.random.normal(generator_key, noise_shape),
    )


def train_critic(players: Players, batch: Batch, settings: Settings) -> tuple[Players, jax.Array]:
    """One Adam step on the hinge loss."""
    noise, labels = batch.critic_noise, batch.labels
    fake_images = Generator().apply({"params": players.generator}, noise, labels)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        # Good practice: this loss has two forward passes, real and fake, so normalize ONCE and
        # give both the result. Two applications of the decorated `Critic` would take two power
        # steps, and real and fake would meet different weights. The gradient goes through the
        # normalization to the raw weights, which stay what the optimizer updates.
        weights, sn_state = critic_weights(params, players.sn_state)
        real = PlainCritic().apply({"params": weights}, batch.images, labels)
        fake = PlainCritic().apply({"params": weights}, fake_images, labels)
        return jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)), sn_state

    (loss, sn_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(players.critic)
    adam = settings.adam(settings.critic_learning_rate)
    updates, opt = adam.update(grads, players.critic_opt)
    critic = optax.apply_updates(players.critic, updates)
    return players._replace(critic=critic, critic_opt=opt, sn_state=sn_state), loss


def train_generator(players: Players, batch: Batch, settings: Settings) -> Players:
    """One Adam step towards higher scores. The critic only judges, so it is frozen."""
    critic = frozen_critic(players)

    def loss_fn(params: Any) -> jax.Array:
        images = Generator().apply({"params": params}, batch.generator_noise, batch.labels)
        return -jnp.mean(critic(images, batch.labels))

    grads = jax.grad(loss_fn)(players.generator)
    adam = settings.adam(settings.generator_learning_rate)
    updates, opt = adam.update(grads, players.generator_opt)
    generator = optax.apply_updates(players.generator, updates)
    return players._replace(generator=generator, generator_opt=opt)


# --- The truth about the critic ----------------------------------------------------------------


def true_norms(players: Players) -> dict[str, float]:
    """Largest singular value of each kernel that the frozen critic computes with.

    By SVD in float64, of the kernel as a matrix (all input axes, output axis). It does not rest on
    what jsn says about itself. NaN where a kernel is not finite.
    """
    kernels = jax.device_get(_frozen_kernels(players))
    matrices = {
        layer: kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
        for layer, kernel in kernels.items()
    }
    return {
        layer: float(np.linalg.norm(matrix, 2)) if np.isfinite(matrix).all() else np.nan
        for layer, matrix in matrices.items()
    }


@jax.jit
def _frozen_kernels(players: Players) -> dict[str, jax.Array]:
    weights, _ = critic_weights(players.critic, players.sn_state, n_steps=0)
    return {layer: weights[layer]["kernel"] for layer in CRITIC_LAYERS}
