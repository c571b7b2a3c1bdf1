"""Station 9, linear primitives: the norm of each as a map of one whole array.

In: the parameters of a primitive, the shape of the array that depends on the input, and the
constant one. Out: a proven bound of the norm; None where there is none. Must not know values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jsn._bounds import upper_bound
from jsn._conv import Conv
from jsn._operator import Matrix
from jsn._upward import root, times


def _largest(bounds: Any) -> float:
    return float(np.max(bounds))


def matrix(A: np.ndarray) -> float:
    """A bound of the norm of a matrix, or of the largest of a stack of them."""
    if 0 in A.shape or not A.any():
        return 0.0
    if 1 in A.shape[-2:] and A.ndim == 2 and np.count_nonzero(A) == 1:
        return float(np.abs(A).max())
    batch = tuple(range(A.ndim - 2))
    return _largest(upper_bound(A, operator=Matrix(-2, -1, batch)))


def _numbers(W: Any) -> np.ndarray:
    """A constant as floats, without rounding."""
    W = np.asarray(W)
    return W.astype(np.float64) if W.dtype.kind in "iub" else W


# --- products -----------------------------------------------------------------------------------


def dot_general(W: Any, which: int, params: dict) -> float:
    """The norm of a product with a constant as the operand that is not number `which`.

    Free axes of the other operand only repeat the matrix, batch axes choose one.
    """
    contracted, batch = (axes[1 - which] for axes in params["dimension_numbers"])
    W = _numbers(W)
    free = [axis for axis in range(W.ndim) if axis not in (*contracted, *batch)]
    sizes = [math.prod(W.shape[axis] for axis in axes) for axes in (batch, contracted, free)]
    A = W.transpose(*batch, *contracted, *free).reshape(sizes)
    return matrix(A[0] if sizes[0] == 1 else A)


def most(W: Any, which: int, params: dict) -> float:
    """How much larger than all inputs an output of that product can be: a sum of moduli."""
    contracted, _ = (axes[1 - which] for axes in params["dimension_numbers"])
    sums = np.abs(_numbers(W).astype(np.float64)).sum(tuple(contracted))
    return float(sums.max(initial=0)) * (1 + 1e-9)


def conv_general_dilated(shape: tuple[int, ...], W: Any, params: dict) -> float | None:
    """The norm of a convolution with a constant kernel."""
    numbers = params["dimension_numbers"]
    groups, strides = params["feature_group_count"], params["window_strides"]
    lhs, rhs = numbers.lhs_spec, numbers.rhs_spec
    sizes = [shape[axis] for axis in lhs[2:]]
    if params["batch_group_count"] != 1 or not 1 <= len(sizes) <= 3 or 0 in (*shape, *W.shape):
        return None
    K = _numbers(W).transpose(*rhs[2:], rhs[1], rhs[0])  # window, in / groups, out
    if not K.any():
        return 0.0
    dilation, pads = params["rhs_dilation"], params["padding"]
    ups = params["lhs_dilation"]
    if all(up == 1 for up in ups) and min(map(min, pads)) >= 0:
        operator = Conv((*sizes, shape[lhs[1]]), strides, tuple(pads), dilation, groups)
        return _largest(upper_bound(K, operator=operator))
    if groups == 1 and all(step == 1 for step in strides) and min(map(min, pads)) >= 0:
        operator = Conv((*sizes, shape[lhs[1]]), ups, tuple(pads), dilation, transpose=True)
        return _largest(upper_bound(K, operator=operator))
    # Zeros between the inputs: the transposed map of a convolution with that stride. Outputs that
    # a stride skips, and padding, only take rows or columns away from the infinite grid.
    window = K.shape[:-2]
    if any(up > 1 for up in ups):
        K = K.reshape(*K.shape[:-1], groups, -1).swapaxes(-1, -3)  # out / groups, groups, in
        K, strides = K.reshape(*window, K.shape[-3], -1), ups
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    channels = K.shape[-2] * groups
    operator = Conv((*reach, channels), strides, "SAME", dilation, groups)
    return _largest(upper_bound(K, operator=operator, method="symbol"))


# --- windows --------------------------------------------------------------------------------------


def _windows(shape: tuple[int, ...], params: dict) -> list[np.ndarray]:
    """For each axis, which outputs read which inputs, as a matrix of 0 and 1."""
    found = []
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    for n, k, s, (low, high), up, d in zip(shape, *(params[name] for name in names), strict=True):
        padded = (n - 1) * up + 1 + low + high if n else 0
        outs = max(0, (padded - (k - 1) * d - 1) // s + 1)
        at = np.arange(outs)[:, None] * s + np.arange(k) * d - low
        read = (at >= 0) & (at % up == 0) & (at // up < n)
        A = np.zeros((outs, n))
        A[np.nonzero(read)[0], at[read] // up] = 1
        found.append(A)
    return found


def reduce_window_sum(shape: tuple[int, ...], params: dict) -> float:
    """The norm of sums over windows: axis by axis."""
    return times(*(matrix(A) for A in _windows(shape, params)))


def reduce_window_max(shape: tuple[int, ...], params: dict) -> float:
    """The constant of maxima over windows: the square root of how many windows share an entry."""
    return root(math.prod(int(A.sum(0).max(initial=0)) for A in _windows(shape, params)))


def cumsum(shape: tuple[int, ...], params: dict) -> float:
    """The norm of running sums."""
    return matrix(np.tri(shape[params["axis"]]))


def cummax(shape: tuple[int, ...], params: dict) -> float:
    """The constant of running maxima, and of running log-sum-exp.

    Each output moves at most as far as the largest of its inputs moves, and an input counts for
    at most all outputs.
    """
    return root(shape[params["axis"]])


ONE_OPERAND: dict[str, Callable[[tuple[int, ...], dict], float]] = {
    "reduce_window_sum": reduce_window_sum,
    "reduce_window_max": reduce_window_max,
    "reduce_window_min": reduce_window_max,
    "cumsum": cumsum,
    "cummax": cummax,
    "cummin": cummax,
    "cumlogsumexp": cummax,
}
"""Linear and similar primitives of one operand."""
