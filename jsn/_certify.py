"""Station 8, matrices on the host: a bound of the norm by one Cholesky factorization in float64.

In: a matrix of floats, of any precision and scale. Out: the square of a bound of its norm, as a
fraction. Must not know operators, convolutions or JAX.

    d I - H^T H is positive semidefinite  <=>  |H|^2 <= d

A factorization of the rounded left side that runs to its end proves the right side, up to what
rounding can have done: `gram`, `shifted` and `factors` round, and each says how much. Where d
comes from does not matter for the proof; `top` estimates it.

References:
    Rump 2006, Verification of positive definiteness, BIT 46, 433-452,
    https://doi.org/10.1007/s10543-006-0056-1.
    Higham 2002, Accuracy and Stability of Numerical Algorithms, theorems 3.5 and 10.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.linalg

from jsn._rounding import TERMS, dropped, gamma, scaled, sqrt_up

blas: Any = scipy.linalg.blas
lapack: Any = scipy.linalg.lapack

_ROWS = 2048
"""Rows of a tall matrix that are converted to float64 and multiplied at once."""
_DENSE = 160
"""Up to this size all eigenvalues cost no more than the largest one by Lanczos."""


def norm_bound(matrix: np.ndarray, exponent: int) -> Fraction:
    """An upper bound of the norm of `2**-exponent * matrix`, whose entries are below 1."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    G, depth = gram(matrix, exponent)
    if not diagonal(G).any():  # sums of squares that cannot underflow: all entries are 0
        return dropped(matrix.size)
    proven = largest_eigenvalue_bound(G) + gram_error(G, depth)
    return sqrt_up(proven) + dropped(matrix.size)


def gram(matrix: np.ndarray, exponent: int) -> tuple[np.ndarray, int]:
    """`H^T H` for `H = 2**-exponent * matrix`, and how many roundings an entry goes through.

    Accumulated over slices of the rows, so that no float64 copy of the matrix is made. Only the
    lower triangle is computed.
    """
    rows, n = matrix.shape
    G = np.zeros((n, n), order="F")
    for start in range(0, rows, _ROWS):
        H = scaled(matrix[start : start + _ROWS], exponent)
        G = blas.dsyrk(1.0, H.T, beta=1.0, c=G, lower=1, overwrite_c=1)
    return G, min(rows, _ROWS) + -(-rows // _ROWS)


def gram_error(G: np.ndarray, depth: int) -> Fraction:
    """How far `gram` can lie from `H^T H`, in norm.

    |G - H^T H| <= gamma(depth) |H|^T |H| entry by entry (Higham, theorem 3.5: any order of
    summation), and the norm of the right side is at most gamma(depth) |H|_F^2. That is the trace
    of H^T H, whose entries, sums of squares, are relatively off by gamma(depth) themselves.
    """
    product = TERMS["product"] * gamma(depth)
    squares = trace(G) / (1 - TERMS["trace"] * gamma(depth))
    return product * squares


def diagonal(A: np.ndarray) -> np.ndarray:
    """The diagonal, real as that of a Hermitian matrix is."""
    return np.real(np.diagonal(A))


def trace(A: np.ndarray) -> Fraction:
    """At least the exact trace of a matrix of floats."""
    return Fraction(math.nextafter(math.fsum(diagonal(A)), math.inf))


def largest_eigenvalue_bound(G: np.ndarray) -> Fraction:
    """An upper bound of the largest eigenvalue of a symmetric or Hermitian matrix of floats.

    Args:
        G: Positive semidefinite up to rounding; its lower triangle is read.

    Returns:
        The bound, some 1e-9 of itself above the truth.
    """
    for d in guesses(G):
        A = shifted(G, d)
        largest = float(diagonal(A).max())
        error = shift_error(largest) + factor_error(A, trace(A), largest)
        if factors(A):
            return Fraction(d) + error
    raise AssertionError("a dominant diagonal factorizes")  # pragma: no cover - d is 1e8 |G| here


def guesses(G: np.ndarray) -> Iterator[float]:
    """Values just above the largest eigenvalue, ever less close."""
    floor = 1e-15 * len(G)  # what the factorization itself usually needs
    if len(G) > _DENSE:
        estimate = top(G)
        yield from (estimate * (1 + floor + excess) for excess in (2e-10, 1e-8))
    exact = max(float(np.linalg.eigvalsh(G)[-1]), float(diagonal(G).max()))
    yield from (exact * (1 + floor + 10.0**k) for k in (-10, -8, -6, -4, -2, 0, 2, 4, 8))


def shifted(G: np.ndarray, d: float) -> np.ndarray:
    """`d I - G` with a rounded diagonal, as the lower triangle of a new matrix."""
    A = np.negative(G)
    A[np.diag_indices(len(A))] += d
    return A


def shift_error(largest: float) -> Fraction:
    """How far `shifted` can lie from `d I - G`, whose positive diagonal entries it rounds."""
    return TERMS["diagonal"] * TERMS["unit"] * Fraction(largest)


def factors(A: np.ndarray) -> bool:
    """Whether the floating point Cholesky factorization of A runs to its end.

    Args:
        A: Its lower triangle is read, and all of it may be overwritten.
    """
    if not diagonal(A).min() > 0:
        return False
    potrf = lapack.zpotrf if np.iscomplexobj(A) else lapack.dpotrf
    return potrf(A, lower=1, clean=0, overwrite_a=1)[1] == 0


def factor_error(A: np.ndarray, trace: Fraction, largest: float) -> Fraction:
    """How far below 0 the smallest eigenvalue of a matrix that `factors` can lie.

    The factor R that was found is exact for A + E, |E| <= gamma(n + 1) |R|^T |R| (Higham, theorem
    10.3). The columns of R obey |r_j|^2 <= A_jj / (1 - gamma(n + 1)), so E has at most the norm
    gamma(n + 1) / (1 - gamma(n + 1)) trace(A) (Demmel 1989; Rump 2006 adds the term for
    underflow, which here covers results flushed to zero). Two more roundings allow for kernels
    that multiply by the reciprocal of a pivot.

    Args:
        A: The matrix; only its size and whether it is complex matter here.
        trace: Its trace, or more.
        largest: Its largest diagonal entry, or more.
    """
    n = len(A)
    relative = gamma((n + 3) * (TERMS["complex"] if np.iscomplexobj(A) else 1))
    underflow = 4 * n * (2 * (n + 1) + Fraction(largest)) * TERMS["tiny"]
    return TERMS["factor"] * relative / (1 - relative) * trace + TERMS["underflow"] * underflow


def top(G: np.ndarray) -> float:
    """An estimate of the largest eigenvalue, from the lower triangle.

    Lanczos with full reorthogonalization, from a fixed start.
    """
    n = len(G)
    product = blas.zhemv if np.iscomplexobj(G) else blas.dsymv
    Q = np.zeros((_STEPS + 1, n), G.dtype)
    start = np.random.default_rng(n).standard_normal(n)
    Q[0] = start / np.linalg.norm(start)
    alpha, beta, last = [], [], 0.0
    for k in range(_STEPS):
        z = product(1.0, G, Q[k], lower=1)
        alpha.append((Q[k].conj() @ z).real)
        for _ in range(2):
            z -= Q[: k + 1].T @ (Q[: k + 1].conj() @ z)
        beta.append(np.linalg.norm(z))
        if not beta[-1] > 1e-14 * last:
            break
        Q[k + 1] = z / beta[-1]
        if k % 8 == 7:
            value = _tridiagonal_top(alpha, beta)
            if value - last <= 1e-11 * value:
                break
            last = value
    return _tridiagonal_top(alpha, beta)


_STEPS = 200


def _tridiagonal_top(alpha: list, beta: list) -> float:
    T = np.diag(alpha) + np.diag(beta[: len(alpha) - 1], -1)
    return float(np.linalg.eigvalsh(T)[-1])
