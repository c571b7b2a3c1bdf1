"""The matrices that sigma is measured on: a tagged table with known answers.

A weight is (inputs, outputs), in float32. `sigma` is what the matrix was built to have, up to
the rounding of its entries; `true_norm` is the oracle, a float64 SVD of the entries as they are.
`test_matrices.py` tests the table itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Problem(NamedTuple):
    """A weight and the largest singular value it was built to have."""

    name: str
    tag: str
    W: np.ndarray
    sigma: float


def true_norm(W, in_axes: int = -1) -> float:
    """The largest singular value of a weight whose last axes are outputs, by float64 SVD.

    `in_axes` counts the leading input axes; -1 means all but the last axis.
    """
    W = np.asarray(W).astype(np.float64)
    rows = int(np.prod(W.shape[:in_axes]))
    return float(np.linalg.svd(W.reshape(rows, -1), compute_uv=False)[0])


def assert_converged(estimate, exact, rtol: float) -> None:
    """An estimate is within `rtol` of the truth, and above it by no more than rounding."""
    estimate, exact = np.asarray(estimate, np.float64), np.asarray(exact, np.float64)
    error = (estimate - exact) / np.where(exact == 0, 1, exact)
    assert np.all(error <= 1e-6), f"sigma {estimate} lies above the truth {exact}"
    assert np.all(error >= -rtol), f"sigma {estimate} misses the truth {exact} by {-error.min()}"


def orthogonal(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """A random n x m matrix with orthonormal columns, or rows if it has fewer of those."""
    q = np.linalg.qr(rng.standard_normal((max(n, m), min(n, m))))[0]
    return q if n >= m else q.T


def with_spectrum(seed: int, n: int, m: int, values) -> np.ndarray:
    """A random n x m matrix with these singular values."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, np.float64)
    left, right = orthogonal(rng, n, len(values)), orthogonal(rng, len(values), m)
    return ((left * values) @ right).astype(np.float32)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    """Independent standard normal entries: many directions compete at the edge."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _spectra() -> list[Problem]:
    """Problems made from their singular values."""
    two = [1.0, 1.0 - 1e-5, *np.linspace(0.9, 0.1, 30)]
    three = [2.0, 2.0, 2.0, *np.linspace(1.5, 0.1, 29)]
    # Few shapes, because each is compiled for itself.
    made = [
        ("gap", "gap", 64, 48, [3.0, *np.linspace(2.0, 0.1, 47)]),
        ("gap_wide", "gap", 24, 80, [0.5, *np.linspace(0.3, 0.01, 23)]),
        ("no_gap", "no_gap", 64, 48, np.linspace(1.0, 0.9, 48)),
        ("near_tie", "near_tie", 64, 48, two),
        ("tie_of_three", "near_tie", 64, 48, three),
        ("crowd", "near_tie", 48, 48, [1.0] * 24 + [0.5] * 24),
        ("decaying", "decaying", 64, 48, 5.0 * np.arange(1, 49) ** -0.7),
        ("steep", "decaying", 48, 48, 10.0 ** -np.linspace(0, 12, 48)),
        ("orthogonal", "orthogonal", 48, 48, np.ones(48)),
        ("orthogonal_tall", "orthogonal", 64, 48, np.full(48, 4.0)),
        ("rank_one", "rank_one", 64, 48, [7.0]),
        ("rank_two", "rank_deficient", 64, 48, [7.0, 6.0]),
        ("tall", "tall", 400, 12, np.linspace(2.0, 1.8, 12)),
        ("wide", "wide", 12, 400, np.linspace(2.0, 1.8, 12)),
        ("one_by_n", "one_by_n", 1, 33, [2.5]),
        ("n_by_one", "one_by_n", 33, 1, [2.5]),
        ("one_by_one", "one_by_n", 1, 1, [2.5]),
        ("tiny", "ill_scaled", 64, 48, 1e-30 * np.linspace(1.0, 0.2, 48)),
        ("huge", "ill_scaled", 64, 48, 1e30 * np.linspace(1.0, 0.2, 48)),
    ]
    return [
        Problem(name, tag, with_spectrum(seed, n, m, values), float(np.max(values)))
        for seed, (name, tag, n, m, values) in enumerate(made)
    ]


def _closed_forms() -> list[Problem]:
    """Problems whose norm is known by a formula."""
    n = 48
    graded = np.zeros((64, 48), np.float32)
    np.fill_diagonal(graded, 10.0 ** np.linspace(-8, 8, 48))
    jordan = np.eye(n, k=1, dtype=np.float32)
    second = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)).astype(np.float32)
    negative = np.diag(-(np.arange(n, 0, -1.0) ** 2)).astype(np.float32)
    return [
        Problem("zero", "zero", np.zeros((64, 48), np.float32), 0.0),
        Problem("zero_column", "zero", np.zeros((33, 1), np.float32), 0.0),
        Problem("ones", "rank_one", np.ones((64, 48), np.float32), float(np.sqrt(64 * 48))),
        Problem("nilpotent", "no_gap", jordan, 1.0),
        Problem("laplacian", "no_gap", second, float(2 + 2 * np.cos(np.pi / (n + 1)))),
        Problem("graded", "ill_scaled", graded, 1e8),
        Problem("negative", "gap", negative, float(n * n)),
    ]


def _gaussians() -> list[Problem]:
    """Problems without a formula: sigma is the oracle's own."""
    shapes = {"gaussian": (128, 128), "gaussian_small": (64, 48)}
    weights = {name: gaussian(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    return [Problem(name, "gaussian", W, true_norm(W)) for name, W in weights.items()]


PROBLEMS = (*_spectra(), *_closed_forms(), *_gaussians())
TAGS = frozenset(problem.tag for problem in PROBLEMS)


def tagged(*tags: str) -> list[Problem]:
    """The problems with any of these tags."""
    unknown = set(tags) - TAGS
    if unknown:
        raise KeyError(f"no problem is tagged {sorted(unknown)}")
    return [problem for problem in PROBLEMS if problem.tag in tags]


def named(name: str) -> Problem:
    """The problem of this name."""
    return next(problem for problem in PROBLEMS if problem.name == name)
