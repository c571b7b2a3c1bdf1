"""Digits in the loop: true convolution norms stay at their bound while a network trains."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layers import layer_norms

import jsn


@functools.cache
def digits():
    """1797 images of 8 x 8, and their labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16 - 0.5).astype(np.float32)
    return images, labels.astype(np.int32)


class Classifier(nn.Module):
    """Three convolutions, as a user would write them."""

    @nn.compact
    def __call__(self, x):
        for features, strides in ((16, 1), (32, 2), (32, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=strides)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def worst_product(rules, steps):
    """Trains, and returns the largest product of the true norms of the three convolutions."""
    images, labels = digits()
    model = Classifier()
    params = model.init(jax.random.key(0), images[:1])["params"]
    if rules == "operators":
        rules = jsn.linen.operators(model, images[:1])
    state, optimizer = jsn.init(params, rules=rules), optax.adam(1e-3)

    @jax.jit
    def step(params, state, moments, x, y):
        def loss(params):
            normalized, after = jsn.normalize(params, state)
            logits = 20 * model.apply({"params": normalized}, x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), (after, normalized)

        slope, (after, normalized) = jax.grad(loss, has_aux=True)(params)
        change, moments = optimizer.update(slope, moments)
        return optax.apply_updates(params, change), after, moments, normalized

    moments, worst = optimizer.init(params), 0
    rng = np.random.default_rng(0)
    for i in range(steps):
        batch = rng.integers(0, len(images), 64)
        x, y = images[batch], labels[batch]
        params, state, moments, normalized = step(params, state, moments, x, y)
        if i % 20 == 0 or i == steps - 1:
            norms = layer_norms(model, {"params": normalized}, images[:1])
            worst = max(worst, norms["Conv_0"] * norms["Conv_1"] * norms["Conv_2"])
    logits = model.apply({"params": normalized}, images)
    assert np.mean(np.argmax(logits, -1) == labels) > 0.85  # it has learned something
    return worst


@pytest.mark.slow
def test_the_product_of_the_true_norms_of_a_classifier_stays_at_one():
    assert worst_product("operators", 300) <= 1.02


@pytest.mark.slow
def test_the_reshape_lets_the_product_grow():
    """The twin that shows the measurement."""
    assert worst_product(jsn.FLAX, 100) > 2


# --- invertible residual networks -----------------------------------------------------------------


class Branch(nn.Module):
    """g of a block x + g(x): two convolutions around a function of slope at most 1."""

    @nn.compact
    def __call__(self, x):
        y = nn.elu(nn.Conv(16, (3, 3))(x))
        return nn.Conv(x.shape[-1], (3, 3))(y)


NormedBranch = jsn.linen.spectral_norm(Branch, rules="operators", bound=0.97)


class Invertible(nn.Module):
    """Three invertible blocks on digits folded to (4, 4, 4), and a linear classifier."""

    def setup(self):
        self.branches = [NormedBranch() for _ in range(3)]
        self.head = nn.Dense(10)

    def features(self, x):
        passed = [x]
        for branch in self.branches:
            x = x + branch(x)
            passed.append(x)
        return passed

    def __call__(self, x):
        return self.head(self.features(x)[-1].reshape(len(x), -1))

    def branch(self, index, x):
        return self.branches[index](x)


as_applied = jax.jit(functools.partial(jsn.normalize, n_steps=0, bound=0.97))


def contractions(variables):
    """The true Lipschitz bound of each branch: the product of the norms of its two layers."""
    found = []
    for i in range(3):
        params, state = (variables[key][f"branches_{i}"] for key in ("params", "sn_state"))
        # As `apply` with a frozen collection sees them.
        params, _ = as_applied(params, state["spectral_norm"])
        norms = layer_norms(Branch(), {"params": params}, jnp.zeros((1, 4, 4, 4)))
        found.append(norms["Conv_0"] * norms["Conv_1"])
    return found


@functools.cache
def trained():
    """A trained stack, and the largest contraction bound seen during training."""
    images, labels = digits()
    images = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 4, 4, 4)
    model, optimizer = Invertible(), optax.adam(3e-3)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    params, state = variables["params"], variables["sn_state"]

    @jax.jit
    def step(params, state, moments, x, y):
        def loss(params):
            logits, updates = model.apply(
                {"params": params, "sn_state": state}, x, mutable=["sn_state"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), updates["sn_state"]

        slope, state = jax.grad(loss, has_aux=True)(params)
        change, moments = optimizer.update(slope, moments)
        return optax.apply_updates(params, change), state, moments

    moments, rng = optimizer.init(params), np.random.default_rng(0)
    worst = contractions({"params": params, "sn_state": state})
    for i in range(1, 301):
        batch = rng.integers(0, len(images), 64)
        params, state, moments = step(params, state, moments, images[batch], labels[batch])
        if i % 20 == 0 or i < 4:
            now = contractions({"params": params, "sn_state": state})
            worst = np.maximum(worst, now)
    return model, {"params": params, "sn_state": state}, images, labels, worst


def test_the_contraction_bound_of_invertible_blocks_holds_throughout_training():
    model, variables, images, labels, worst = trained()
    assert np.max(worst) <= 0.95  # 0.97 ** 2 is 0.9409
    assert np.min(worst) >= 0.9409 - 1e-3  # and the bound is attained
    logits = model.apply(variables, images)
    assert np.mean(np.argmax(logits, -1) == labels) > 0.9


def test_blocks_are_inverted_in_the_number_of_steps_that_theory_gives():
    """x <- y - g(x) shrinks the error by the contraction bound L in each step."""
    model, variables, images, _, _ = trained()
    passed = model.apply(variables, images[:64], method="features")
    size = lambda x: np.sqrt(np.sum(np.square(x), axis=(1, 2, 3))).max()
    branch = jax.jit(lambda i, x: model.apply(variables, i, x, method="branch"), static_argnums=0)
    for i, contraction in enumerate(contractions(variables)):
        x, y = passed[i], passed[i + 1]
        predicted = int(np.ceil(np.log(1e-5 / size(y - x)) / np.log(contraction)))
        guess, steps = y, 0
        while size(guess - x) > 1e-5 and steps <= predicted:
            guess, steps = y - branch(i, guess), steps + 1
        assert steps <= predicted, (steps, predicted)
