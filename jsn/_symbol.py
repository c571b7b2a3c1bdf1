"""Station 8, convolutions: a bound of the norm for every input size, from the symbol.

In: a kernel and the geometry of its layer. Out: the square of a bound of its norm, as a fraction.
Must not know about JAX.

A zero-padded convolution is a piece of the convolution on the infinite grid, whose norm is the
largest norm of its symbol over all frequencies. With stride s and dilation d the taps of one
axis fall into q = s / gcd(s, d) phases, each a convolution of its own; up to unitary factors the
symbol is that of stride q and dilation 1,

    F(w) = sum_l C_l exp(i l w),    C_l: the taps l q, ..., l q + q - 1 side by side,

and F F^* is a polynomial too, whose coefficients are formed once. Between frequencies a
polynomial can rise by no more than M. Riesz allows: for unit vectors a and b, a^* F(w) b times a
unitary factor is of exponential type t_i = (taps - 1) / 2 in axis i, so along the straight line to
a point at distances h_i it is of type sum t_i h_i, and falls from its largest modulus M at most to
M cos(sum t_i h_i) there (Duffin and Schaeffer 1938). So

    |F| <= bound everywhere   if   |F(w)| <= bound * cos(sum t_i r_i)   at the centres of cells of
                                   half-widths r_i that cover all frequencies,

and each cell is proven by one Cholesky factorization, or divided. The symbol is even up to
conjugation: half of the frequencies do.

References:
    Duffin and Schaeffer 1938, Some properties of functions of exponential type,
    https://doi.org/10.1090/S0002-9904-1938-06725-0. For a real function h of type t, |h| <= M:
    h^2 + (h'/t)^2 <= M^2, so the angle arccos(h / M) grows at most at the rate t.
    Sedghi, Gupta and Long 2019, The Singular Values of Convolutional Layers,
    https://arxiv.org/abs/1805.10408 (the circular case).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jsn import _certify
from jsn._rounding import TERMS, gamma, sqrt_up

_GOAL = 1e-3
"""Cells are divided until their radius costs no more than this ..."""
_BUDGET = 2e11
"""... or until the next division would cost more than so many operations."""
_CHUNK = 2**21
"""Entries of the matrices that are held at once."""


class Axis(NamedTuple):
    """One spatial axis: how many taps a phase has, and which frequencies matter."""

    taps: int
    circle: tuple[int, int] | None = None
    """(n, step): only the frequencies 2 pi (step m mod n) / n, or None: all of them."""


class Symbol(NamedTuple):
    """F F^* as a polynomial with coefficients R: even parts R + R^T, odd parts R - R^T."""

    lags: np.ndarray
    even: np.ndarray
    odd: np.ndarray
    shape: tuple[int, int]
    """Number of groups, and size of their matrices."""
    error: Fraction
    """How far a computed value of F F^* can lie from the truth, in norm."""

    def at(self, turns: np.ndarray, of: Sequence[int]) -> np.ndarray:
        """F F^* at the frequencies `2 pi turns / of`, of shape `(frequencies, groups, n, n)`."""
        cos, sin = waves(self.lags, turns, of)
        groups, n = self.shape
        G = np.empty((len(turns), groups * n * n), complex)
        G.real = cos @ self.even
        G.imag = sin @ self.odd
        return G.reshape(-1, groups, n, n)


def symbol(C: np.ndarray) -> Symbol:
    """The Gram symbol of coefficients `(groups, *taps, rows, columns)` with entries below 1.

    Its error: a coefficient is an inner product of all taps and columns, and is added to its
    transpose; the waves are off by TERMS["waves"]; the series is an inner product again. Each is
    relative to the same sum of moduli, S S^T with S = sum_l |C_l|, whose norm is at most |S|_F^2;
    real and imaginary part together give the square root of 2.
    """
    groups, *taps, rows, columns = C.shape
    if rows > columns:
        C, rows, columns = np.swapaxes(C, -1, -2), columns, rows
    lags = _half(taps)
    even, odd = [], []
    for lag in lags:
        ahead = tuple(slice(max(0, m), n + min(0, m)) for m, n in zip(lag, taps, strict=True))
        behind = tuple(slice(max(0, -m), n + min(0, -m)) for m, n in zip(lag, taps, strict=True))
        R = correlate(C[(slice(None), *ahead)], C[(slice(None), *behind)])
        even.append(R + np.swapaxes(R, -1, -2) if any(lag) else R)
        odd.append(R - np.swapaxes(R, -1, -2) if any(lag) else np.zeros_like(R))
    n_taps, n_lags = math.prod(taps), len(lags)
    coefficients = TERMS["coefficients"] * gamma(n_taps * columns + 1)
    off = TERMS["waves"] * len(taps) * TERMS["unit"]
    series = TERMS["series"] * gamma(n_lags + 1)
    S = np.abs(C).reshape(groups, -1, rows, columns).sum(1)
    squares = Fraction(float((S * S).sum((1, 2)).max()))
    squares /= 1 - gamma(2 * n_taps + rows * columns + 2)
    relative = (1 + coefficients) * (1 + off) * (1 + series) - 1
    error = sqrt_up(Fraction(2)) * relative * squares + 4 * n_lags * rows * TERMS["tiny"]
    flat = (n_lags, groups * rows * rows)
    return Symbol(lags, np.reshape(even, flat), np.reshape(odd, flat), (groups, rows), error)


def _half(taps: Sequence[int]) -> np.ndarray:
    """The lags between taps, one of each pair (m, -m), the lag 0 first."""
    lags = np.indices([2 * n - 1 for n in taps]).reshape(len(taps), -1).T - (np.array(taps) - 1)
    return lags[len(lags) // 2 :]


def correlate(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """The sum over all taps of `X_l Y_l^T`, for each group."""
    groups, rows, columns = X.shape[0], X.shape[-2], X.shape[-1]
    X, Y = (
        np.moveaxis(Z.reshape(groups, -1, rows, columns), 1, 2).reshape(groups, rows, -1)
        for Z in (X, Y)
    )
    return X @ np.swapaxes(Y, -1, -2)


def waves(lags: np.ndarray, turns: np.ndarray, of: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Cos and sin of `2 pi <lag, turns / of>`, of shape `(frequencies, lags)`.

    Whole turns are taken off in integers, so for D axes the angle is off by at most 40 D units of
    rounding, and a cos or sin of the C library or of numpy by at most 4 more.
    """
    phase = np.zeros((len(turns), len(lags)))
    for axis, whole in enumerate(of):
        phase += (turns[:, None, axis] * lags[None, :, axis] % whole) / whole
    angle = 2 * np.pi * phase
    return np.cos(angle), np.sin(angle)


# --- the largest norm over all frequencies -----------------------------------------------------


def norm_bound(C: np.ndarray, axes: Sequence[Axis]) -> Fraction:
    """An upper bound of the norm of the symbol over all frequencies of the axes.

    Args:
        C: Coefficients `(groups, *taps, rows, columns)`, entries below 1; the groups are
            independent convolutions, and the largest of their norms counts.
        axes: One for each spatial axis.
    """
    gram = symbol(C)
    turns, of = _first(axes, gram.shape)
    moving = np.array([axis.taps > 1 and axis.circle is None for axis in axes])
    active = np.ones((len(turns), gram.shape[0]), bool)
    vectors = _start(len(turns), *gram.shape)
    goal = _GOAL if moving.any() else 1e-9
    target, proven, n_steps = 0.0, Fraction(0), 12
    while True:
        fall = _fall(axes, of, moving)
        estimates = _estimates(gram, turns, of, vectors, n_steps)
        target = max(target, float(estimates[active].max()) * (1 + goal) ** 2)
        cost = active.sum() * 2.0 ** moving.sum() * _cost(gram.shape[1])
        last = not moving.any() or fall >= 1 / (1 + goal / 2) or cost > _BUDGET
        if last:
            target = max(target, float(estimates[active].max()) / fall**2 * (1 + 1e-9))
        level, target = _prove(gram, turns, of, active, estimates, target, fall, last)
        proven = max(proven, level)
        if not active.any():
            return sqrt_up(proven)
        keep, n_steps = active.any(1), 3  # a child starts from its parent's vector
        turns, of, children = _divide(turns[keep], of, moving)
        active, vectors = (np.repeat(x[keep], children, axis=0) for x in (active, vectors))


def _cost(n: int) -> float:
    """Operations for one matrix of a cell; a call costs as much as a small factorization."""
    return 1.5 * n**3 + (2e5 if n > 1 else 2e4)


def _first(axes: Sequence[Axis], shape: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """The centres of the first cells, as `turns / of`: half of all frequencies."""
    sides, of, halved = [], [], False
    for axis in axes:
        if axis.circle is not None:
            whole, step = axis.circle
            turns = np.unique(step * np.arange(whole) % whole)
        elif axis.taps > 1:
            cells = 1 << (4 * (axis.taps - 1) - 1).bit_length()
            whole, turns = 2 * cells, 2 * np.arange(cells)
        else:
            whole, turns = 1, np.zeros(1, int)
        if not halved and len(turns) > 1:
            turns, halved = turns[2 * turns <= whole], True
        sides.append(turns)
        of.append(whole)
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(axes)), of


def _fall(axes: Sequence[Axis], of: Sequence[int], moving: np.ndarray) -> float:
    """At most the share of its maximum that a polynomial keeps at the centre of its cell.

    The product of the axes' cosines, which is larger, would do for a grid, but not for cells of
    several sizes: cos(w_1 + w_2), as it falls from the corner of a cell, keeps less.
    """
    angle = 0.0
    for axis, whole, moves in zip(axes, of, moving, strict=True):
        if moves:  # cells / whole = 1/2, half-width = pi / cells, type (taps - 1) / 2
            angle += math.pi * (axis.taps - 1) / whole
    return 1 - TERMS["riesz"] * (1 - math.cos(angle) * (1 - 2.0**-45))


def _divide(
    turns: np.ndarray, of: Sequence[int], moving: np.ndarray
) -> tuple[np.ndarray, list[int], int]:
    """Halves the cells along each moving axis: their centres move by a quarter of a cell."""
    signs = np.stack(np.meshgrid(*[[-1, 1] if m else [0] for m in moving], indexing="ij"), -1)
    signs = signs.reshape(-1, len(of))
    of = [2 * whole if moves else whole for whole, moves in zip(of, moving, strict=True)]
    turns = np.where(moving, 2 * turns, turns)
    return (turns[:, None] + signs).reshape(-1, len(of)), of, len(signs)


def _chunks(gram: Symbol, count: int) -> Iterator[slice]:
    groups, n = gram.shape
    size = max(1, _CHUNK // (groups * n * n + len(gram.lags)))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _start(count: int, groups: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    return np.broadcast_to(rng.standard_normal(n) + 0j, (count, groups, n)).copy()


def _estimates(
    gram: Symbol, turns: np.ndarray, of: Sequence[int], vectors: np.ndarray, n_steps: int
) -> np.ndarray:
    """Largest eigenvalues at all centres, from below: power steps on all vectors, in place."""
    found = np.empty(vectors.shape[:2])
    for chunk in _chunks(gram, len(turns)):
        G, v = gram.at(turns[chunk], of), vectors[chunk]
        for _ in range(n_steps):
            v /= np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-300)
            v[:] = (G @ v[..., None])[..., 0]
        found[chunk] = np.linalg.norm(v, axis=-1)
    return found


def _prove(
    gram: Symbol,
    turns: np.ndarray,
    of: Sequence[int],
    active: np.ndarray,
    estimates: np.ndarray,
    target: float,
    fall: float,
    last: bool,
) -> tuple[Fraction, float]:
    """Proves cells, and takes them off `active`: all of them if they are the last.

    Returns:
        What is proven for all their frequencies, and the target, raised where it had to be.
    """
    largest, n = 0.0, gram.shape[1]
    proven = Fraction(0)
    for chunk in _chunks(gram, len(turns)):
        wanted = active[chunk] & (last | (estimates[chunk] <= target * fall**2))
        if not wanted.any():
            continue
        G = gram.at(turns[chunk], of)
        if n == 1:  # numbers: nothing to factorize
            values = np.where(wanted, np.real(G[..., 0, 0]), 0)
            proven = max(proven, Fraction(float(values.max())))
            active[chunk] &= ~wanted
            continue
        for cell, group in np.argwhere(wanted):
            d = target * fall**2
            A = _certify.shifted(G[cell, group].T, d)
            top = float(_certify.diagonal(A).max())
            if _certify.factors(A):
                largest = max(largest, top)
                proven = max(proven, Fraction(d))
            elif last:
                bound = _certify.largest_eigenvalue_bound(G[cell, group].T)
                proven = max(proven, bound)
                target = max(target, float(bound) / fall**2)
            else:
                continue
            active[chunk][cell, group] = False
    trace, like = n * Fraction(largest), np.empty((n, n), complex)
    error = _certify.shift_error(largest) + _certify.factor_error(like, trace, largest)
    return (proven + error + gram.error) / Fraction(fall) ** 2, target
