"""Station 8, convolutions: what `Conv` says, as coefficients of a symbol or as dense matrices.

In: a `Conv` and one kernel, as a float64 array with entries below 1. Out: a bound of its norm, as
a fraction. Must not know about JAX arrays, batches or scales.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from jsn import _certify, _symbol
from jsn._conv import Conv
from jsn._conv_axis import WRAPS, Axis
from jsn._rounding import TERMS, gamma, sqrt_up

_POINTS = 2048
"""A circular convolution with more frequencies than this is bounded over all frequencies."""


# --- one spatial axis ----------------------------------------------------------------------------


def phases(axis: Axis) -> int:
    """q: two taps act on common inputs only if they lie a multiple of q apart."""
    return axis.stride // math.gcd(axis.stride, axis.dilation)


def source(axis: Axis) -> np.ndarray:
    """Where each entry of the extended input comes from."""
    index = np.arange(axis.size)
    mode = WRAPS.get(axis.padding) if isinstance(axis.padding, str) else None
    return np.pad(index, axis.around, mode=mode) if mode else index  # type: ignore


def pairs(axis: Axis, tap: int) -> tuple[np.ndarray, np.ndarray]:
    """The outputs that read through this tap, and the inputs they read."""
    p = np.arange(axis.conv)
    if axis.transpose:
        at = p + axis.dilation * tap - axis.pads[0]
        read = (at >= 0) & (at % axis.stride == 0) & (at < axis.size * axis.stride)
        before = -(-(-(axis.conv - axis.out) % (2 * axis.out)) // 2)  # as Flax folds
        return (p[read] + before) % axis.out, at[read] // axis.stride
    at, origin = p * axis.stride + axis.dilation * tap - axis.pads[0], source(axis)
    read = (at >= 0) & (at < len(origin))
    return p[read], origin[at[read]]


def repeats(axis: Axis) -> int:
    """How often one input can stand in the extended input, as far as that is read at all.

    The columns of the extension are orthogonal, so this is the square of its norm.
    """
    if axis.transpose:
        return 1
    taps, origin = axis.dilation * np.arange(axis.window), source(axis)
    at = np.unique(np.arange(axis.conv)[:, None] * axis.stride + taps - axis.pads[0])
    at = at[(at >= 0) & (at < len(origin))]
    return int(np.bincount(origin[at]).max()) if len(at) else 1


def circle(axis: Axis) -> tuple[int, int] | None:
    """The frequencies of a circular axis: `2 pi (step m mod n) / n`; None if it is not one."""
    if axis.padding != "CIRCULAR" or (axis.size % axis.stride and not axis.transpose):
        return None
    step = axis.dilation // math.gcd(axis.stride, axis.dilation)
    return axis.size // (1 if axis.transpose else axis.stride), step


# --- the symbol: any input size ------------------------------------------------------------------


def symbol_bound(operator: Conv, K: np.ndarray) -> Fraction:
    """A bound of the norm of the layer by the symbol of its kernel."""
    axes = operator._axes(K.shape[:-2])
    uneven = [axis.padding == "CIRCULAR" and not circle(axis) for axis in axes]
    bounds = [_variant(operator, K, axes)]
    if any(uneven):  # or: some rows of the convolution of stride 1
        axes = [a._replace(stride=1) if u else a for a, u in zip(axes, uneven, strict=True)]
        bounds.append(_variant(operator, K, axes))
    return min(bounds)


def _variant(operator: Conv, K: np.ndarray, axes: list[Axis]) -> Fraction:
    """The bound for these axes.

    A circular convolution whose stride divides its length is exactly its symbol at the
    frequencies of the circle. Any other one, and a reflected one, is the plain convolution after
    the extension of the input, whose norm is a factor.
    """
    C = coefficients(operator, K, axes)
    circles = [circle(axis) for axis in axes]
    exact = all(circles) and math.prod(n for n, _ in circles) <= _POINTS  # type: ignore
    found = [
        _symbol.Axis(n, known if exact else None)
        for n, known in zip(C.shape[1:-2], circles, strict=True)
    ]
    return _extension(axes) * _symbol.norm_bound(C, found)


def _extension(axes: list[Axis]) -> Fraction:
    """The norm of the extension of the input, where the symbol does not account for it."""
    square = math.prod(repeats(axis) for axis in axes if not circle(axis))
    return 1 + TERMS["padding"] * (sqrt_up(Fraction(square)) - 1)


def coefficients(operator: Conv, K: np.ndarray, axes: list[Axis]) -> np.ndarray:
    """The coefficients of the symbol, `(groups, *taps, rows, columns)`, phases side by side."""
    groups, rank = operator.feature_group_count, len(axes)
    every = [phases(axis) for axis in axes]
    taps = [-(-axis.window // q) for axis, q in zip(axes, every, strict=True)]
    missing = [n * q - axis.window for n, q, axis in zip(taps, every, axes, strict=True)]
    ins, outs = K.shape[-2:]
    K = np.pad(K, [*((0, m) for m in missing), (0, 0), (0, 0)])
    split = [m for n, q in zip(taps, every, strict=True) for m in (n, q)]
    K = K.reshape(*split, ins, groups, outs // groups)
    at_taps, at_phases = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    # The phases belong to the side that the stride makes larger: to the inputs, or transposed.
    one, other = (2 * rank, 2 * rank + 2) if operator.transpose else (2 * rank + 2, 2 * rank)
    K = K.transpose(2 * rank + 1, *at_taps, one, *at_phases, other)
    return K.reshape(groups, *taps, K.shape[rank + 1], -1)


def overlap(operator: Conv, shape: tuple[int, ...]) -> Fraction:
    """What the norm of the layer can exceed that of the reshaped kernel by.

    The symbol is the matrix of all coefficients side by side, times the column of their waves,
    whose norm is the square root of their number: ceil(k / q) in each axis.
    """
    axes = operator._axes(operator._kernel(shape)[:-2])
    square = math.prod(-(-axis.window // phases(axis)) for axis in axes)
    return (1 + TERMS["overlap"] * (sqrt_up(Fraction(square)) - 1)) * _extension(axes)


# --- the dense matrix: one input size, any padding -----------------------------------------------


def dense_size(operator: Conv, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrix of one group."""
    groups = operator.feature_group_count
    return tuple(math.prod(side(shape)) // groups for side in (operator.codomain, operator.domain))  # type: ignore


def dense_bound(operator: Conv, K: np.ndarray) -> Fraction:
    """A bound of the norm of the layer by its matrices, one for each group."""
    axes, groups = operator._axes(K.shape[:-2]), operator.feature_group_count
    bounds = []
    for kernel in np.split(K, groups, axis=-1):
        A, moduli, terms = dense(kernel, axes), dense(np.abs(kernel), axes), 1
        terms = int(dense(np.ones_like(kernel[..., :1, :1]), axes).max())
        # The sum of n entries is off by at most gamma(n - 1) of the sum of their moduli.
        size = float(np.linalg.norm(moduli)) * (1 + 1e-6)
        off = TERMS["assembly"] * gamma(terms - 1) * Fraction(size)
        bounds.append(_certify.norm_bound(A, 0) + off)
    return max(bounds)


def dense(K: np.ndarray, axes: list[Axis]) -> np.ndarray:
    """The matrix of a convolution without groups, outputs by inputs."""
    rank = len(axes)
    ins, outs = K.shape[-2:]
    shape = (*(axis.out for axis in axes), *(axis.size for axis in axes))
    A = np.zeros((*shape, outs, ins))
    for tap in np.ndindex(*K.shape[:rank]):
        reads = [pairs(axis, j) for axis, j in zip(axes, tap, strict=True)]
        at = [
            index.reshape([-1 if i == axis else 1 for i in range(rank)])
            for side in (0, 1)
            for axis, index in enumerate(pair[side] for pair in reads)
        ]
        A[tuple(at)] += K[tap].T
    at_out, at_in = range(rank), range(rank, 2 * rank)
    A = A.transpose(*at_out, 2 * rank, *at_in, 2 * rank + 1)
    return A.reshape(math.prod(shape[:rank]) * outs, -1)
