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


class Digits(NamedTuple):
    """Pictures of shape `(n, 8, 8, 1)` with pixels in [-1, 1], and their labels."""

    images: NDArray[np.float32]
    labels: NDArray[np.int32]


class Scores(NamedTuple):
    """How good a set of pictures is.

    Attributes:
        frechet: distance to the real digits in the classifier's feature space; lower is better.
        accuracy: share of the pictures the classifier reads as their label; higher is better.
    """

    frechet: float
    accuracy: float


def load_split(seed: int) -> tuple[Digits, Digits]:
    """Load the real digits: 75 % to train on, 25 % held out, both with all classes."""
    bunch = load_digits()
    images = (bunch.images[..., None] / 8.0 - 1.0).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    return Digits(train_x, train_y), Digits(test_x, test_y)


class Classifier(nn.Module):
    """A small convolutional network that returns logits and the features under them."""

    n_features: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.relu(nn.Conv(64, (3, 3), strides=(2, 2))(x))
        features = nn.relu(nn.Dense(self.n_features)(x.reshape(len(x), -1)))
        return nn.Dense(N_CLASSES)(features), features


def train_classifier(digits: Digits, seed: int, steps: int = 400, batch_size: int = 128) -> Any:
    """Train the classifier with Adam and return its parameters."""
    model, optimizer = Classifier(), optax.adam(2e-3)
    key, init_key = jax.random.split(jax.random.key(seed))
    images, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        logits, _ = model.apply({"params": params}, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry: tuple[Any, Any], step_key: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, opt_state = carry
        rows = jax.random.randint(step_key, (batch_size,), 0, len(images))
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, rows), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    params = model.init(init_key, images[:1])["params"]
    start = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda c, keys: jax.lax.scan(step, c, keys))(
        start, jax.random.split(key, steps)
    )
    return params


class Judge:
    """A trained classifier that scores pictures against the real training digits."""

    def __init__(self, train: Digits, seed: int) -> None:
        self._params = train_classifier(train, seed)
        self._classify = jax.jit(lambda params, x: Classifier().apply({"params": params}, x))
        self._real_moments = moments(self._features(train.images)[1])

    def _features(self, images: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
        logits, features = self._classify(self._params, images)
        return np.asarray(logits), np.asarray(features, dtype=np.float64)

    def score(self, pictures: Digits) -> Scores:
        """Score pictures; their labels are the digits they are meant to show."""
        logits, features = self._features(pictures.images)
        accuracy = float(np.mean(logits.argmax(axis=1) == pictures.labels))
        return Scores(frechet_distance(moments(features), self._real_moments), accuracy)


def moments(features: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Mean and covariance of features of shape `(n, d)`."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(p: tuple[NDArray, NDArray], q: tuple[NDArray, NDArray]) -> float:
    """Frechet distance between two Gaussians, each given by mean and covariance.

    `|m_p - m_q|^2 + tr(C_p + C_q - 2 (C_p C_q)^(1/2))` (Heusel et al. 2017, arXiv:1706.08500).
    """
    (mean_p, cov_p), (mean_q, cov_q) = p, q
    # The eigenvalues of C_p C_q are real and not negative, but for rounding.
    eigenvalues = np.linalg.eigvals(cov_p @ cov_q).real.clip(min=0.0)
    trace = np.trace(cov_p) + np.trace(cov_q) - 2.0 * np.sqrt(eigenvalues).sum()
    return float(np.sum((mean_p - mean_q) ** 2) + trace)
