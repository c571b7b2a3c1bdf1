"""Station 9, its use: how far an input can move before a classifier changes its mind.

In: the logits of a classifier and a proven bound of its Lipschitz constant. Out: radii that no
attack can beat, rounding of the radius included. Must not know the classifier.

Let f map inputs to logits with |f(x) - f(y)| <= L |x - y| in l2, and let class i have the largest
logit at x. For every other class j the difference f_i - f_j = <e_i - e_j, f> changes by at most
|e_i - e_j| L |d| = sqrt(2) L |d| when x moves by d. So class i stays on top as long as

    |d| < (f_i(x) - max_j f_j(x)) / (sqrt(2) L).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jsn import _errors

_SQRT_2_UP = np.nextafter(np.sqrt(np.float64(2)), 2)
_DOWN = 1 - 2.0**-50
"""Three operations, each off by at most 2^-53 relatively: difference, quotient and this product."""


def certified_radius(logits: Any, bound: Any) -> np.ndarray:
    """The l2 radius around each input within which the predicted class is proven not to change.

    That is the margin between the largest and the second largest logit, over sqrt(2) times the
    Lipschitz constant. Any input at a distance below or at the radius gets the same class, if
    the network is evaluated exactly: the rounding in the radius itself goes down, the rounding
    within the logits, some 1e-6 of them in float32, is not part of the claim.

    A tie gives 0, as do logits that are not finite and an infinite bound. A bound of 0, a
    network that does not depend on its input, gives infinity where there is no tie.

    Args:
        logits: Shape `(..., classes)`: logits, not probabilities.
        bound: An upper bound of the l2 Lipschitz constant of the map from one input to its
            logits, such as `jsn.lipschitz_bound` gives; or one for each example.

    Returns:
        Radii in float64, of shape `(...)`.

    Raises:
        ValueError: If there are fewer than two classes, logits are no real numbers, or the
            bound is negative, NaN, or of a shape that does not fit.

    Examples:
        >>> import jsn
        >>> radius = jsn.certified_radius([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]], 2.0)
        >>> print(radius.round(4))  # 2 / (sqrt(2) * 2), and a tie
        [0.7071 0.    ]

    References:
        Tsuzuku et al. 2018, Lipschitz-Margin Training: Scalable Certification of Perturbation
        Invariance for Deep Neural Networks, https://arxiv.org/abs/1802.04034.
        Li et al. 2019, Preventing Gradient Attenuation in Lipschitz Constrained Convolutional
        Networks, https://arxiv.org/abs/1911.00937.
    """
    x = np.asarray(logits)
    real = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
    if not real or x.ndim < 1 or x.shape[-1] < 2:
        raise ValueError(_errors.bad_logits(f"shape {x.shape} and dtype {x.dtype}"))
    x = x.astype(np.float64)
    L = np.asarray(bound, np.float64)
    if L.shape not in ((), x.shape[:-1]):
        raise ValueError(_errors.bad_lipschitz(f"of shape {L.shape}, for {x.shape[:-1]} examples"))
    if not (L >= 0).all():
        raise ValueError(_errors.bad_lipschitz(f"{float(np.min(L))}"))
    usable = np.asarray(np.isfinite(x).all(axis=-1))
    second, first = np.moveaxis(np.sort(np.where(usable[..., None], x, 0.0))[..., -2:], -1, 0)
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        margin = np.minimum(first - second, np.finfo(np.float64).max)
        slope = np.nextafter(_SQRT_2_UP * L, np.inf)
        quotient = margin / np.where(L > 0, slope, 1.0)
        radius = np.nextafter(quotient * _DOWN, 0.0)
    return np.where(L > 0, radius, np.where(margin > 0, np.inf, 0.0))


def certified_accuracy(logits: Any, labels: Any, bound: Any, radii: Any) -> np.ndarray:
    """The share of inputs that are classified right, and provably so within each l2 radius.

    No attack that moves each input by at most the radius can push the accuracy below it. At
    radius 0 it is the accuracy, ties counted as wrong.

    Args:
        logits: Shape `(..., classes)`.
        labels: The right classes, integers of shape `(...)`.
        bound: As in `certified_radius`.
        radii: One radius, or an array of them.

    Returns:
        Shares between 0 and 1, of the shape of `radii`.

    Raises:
        ValueError: As `certified_radius` does; if labels are no classes of the logits, there are
            none, or a radius is negative or NaN.

    Examples:
        >>> import jsn
        >>> logits = [[3.0, 1.0], [0.0, 1.0], [0.0, 4.0]]  # the second one is wrong
        >>> print(jsn.certified_accuracy(logits, [0, 0, 1], 1.0, [0.0, 1.0, 2.0]).round(3))
        [0.667 0.667 0.333]
    """
    radius = certified_radius(logits, bound)
    x, y, r = np.asarray(logits), np.asarray(labels), np.asarray(radii, np.float64)
    classes = x.shape[-1]
    if y.shape != radius.shape or not np.issubdtype(y.dtype, np.integer) or not y.size:
        expected = f"integers of shape {radius.shape}, at least one"
        raise ValueError(_errors.bad_labels(f"shape {y.shape} and dtype {y.dtype}", expected))
    if not ((y >= 0) & (y < classes)).all():
        raise ValueError(
            _errors.bad_labels(f"values from {y.min()} to {y.max()}", f"0 to {classes - 1}")
        )
    if not (r >= 0).all():
        raise ValueError(_errors.bad_radii(str(float(np.min(r)))))
    right = (x.argmax(axis=-1) == y).ravel()
    return np.asarray((right & (radius.ravel() > r[..., None])).mean(axis=-1))
