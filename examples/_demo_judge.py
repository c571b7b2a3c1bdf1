"""The judge of the demo: real digits, a small classifier, and two scores for pictures.

In: scikit-learn's 8x8 digits. Out: a trained classifier that says how good a set of pictures is.
Must not know: the GAN, spectral normalization, tables and figures.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

N_CLASSES = 10

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean `(d,)` and covariance `(d, d)`."""


class Digits(NamedTuple):
    """Pictures of shape `(n, 8, 8, 1)` with pixels in [-1, 1], and the digits they show."""

    images: NDArray[np.float32]
    labels: NDArray[np.int32]


class Scores(NamedTuple):
    """How good a set of pictures is.

    Attributes:
        frechet: Distance to the real digits in the classifier's feature space; lower is better.
        accuracy: Share of pictures that the classifier reads as their label; higher is better.
    """

    frechet: float
    accuracy: float


def load_split(seed: int) -> tuple[Digits, Digits]:
    """Loads the real digits: 75 % to train on and 25 % held out, every class in both."""
    bunch = load_digits()
    images = (bunch.images[..., None] / 8.0 - 1.0).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    return Digits(train_x, train_y), Digits(test_x, test_y)


class Classifier(nn.Module):
    """A small convolutional network: logits, and the features under them."""

    n_features: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        features = nn.relu(nn.Dense(self.n_features)(x.reshape(len(x), -1)))
        return nn.Dense(N_CLASSES)(features), features


def train_classifier(digits: Digits, seed: int, steps: int = 400, batch_size: int = 128) -> Any:
    """Trains the classifier with Adam and returns its parameters."""
    model, optimizer = Classifier(), optax.adam(2e-3)
    images, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)
    init_key, data_key = jax.random.split(jax.random.key(seed))

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        logits, _ = model.apply({"params": params}, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    @jax.jit
    def train_step(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any]:
        rows = jax.random.randint(key, (batch_size,), 0, len(images))
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, rows), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = jax.jit(model.init)(init_key, images[:1])["params"]
    opt_state = optimizer.init(params)
    for key in jax.random.split(data_key, steps):
        params, opt_state = train_step(params, opt_state, key)
    return params


class Judge:
    """A trained classifier that compares pictures with the real digits it was trained on."""

    def __init__(self, train: Digits, seed: int, steps: int = 400) -> None:
        self._params = train_classifier(train, seed, steps)
        self._classify = jax.jit(lambda params, x: Classifier().apply({"params": params}, x))
        self._real = moments(self._read(train.images)[1])

    def score(self, pictures: Digits) -> Scores:
        """Scores pictures; their labels are the digits they are meant to show."""
        guesses, features = self._read(pictures.images)
        accuracy = float(np.mean(guesses == pictures.labels))
        return Scores(frechet_distance(moments(features), self._real), accuracy)

    def _read(self, images: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float64]]:
        logits, features = self._classify(self._params, images)
        return np.asarray(logits).argmax(axis=1), np.asarray(features, dtype=np.float64)


def moments(features: NDArray[np.float64]) -> Moments:
    """Mean and covariance of features of shape `(n, d)`."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(p: Moments, q: Moments) -> float:
    """Fréchet distance between two Gaussians (Heusel et al. 2017, arXiv:1706.08500).

    It is `|m_p - m_q|^2 + tr(C_p + C_q - 2 (C_p C_q)^(1/2))`, and NaN where `p` or `q` is not
    finite.
    """
    (mean_p, cov_p), (mean_q, cov_q) = p, q
    product = cov_p @ cov_q
    if not np.isfinite(product).all():
        return float("nan")
    # The eigenvalues of a product of two covariances are real and not negative, up to rounding.
    trace_of_root = np.sqrt(np.linalg.eigvals(product).real.clip(min=0.0)).sum()
    squared_shift = np.sum((mean_p - mean_q) ** 2)
    return float(squared_shift + np.trace(cov_p) + np.trace(cov_q) - 2.0 * trace_of_root)
