"""Station 8. `upper_bound`: a proven bound of the norm of one weight.

In: a weight, its operator, a method. Out: bounds, as float64 on the host. Here a weight is
checked, split into its batch entries and scaled; the proofs are in `_certify` (one factorization),
`_symbol` and `_window` (convolutions) and `_gram` (on the device). Must not know trees or rules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jsn import _certify, _errors, _gram, _window
from jsn._conv import Conv
from jsn._operator import Matrix, size
from jsn._rounding import (
    check_arithmetic,
    dropped,
    float_up,
    power_of_two,
    scaled,
    sqrt_up,
)
from jsn._rules import Leaf, check_weights
from jsn._types import Operator

_CALL = "jsn.upper_bound"
_DENSE_SIDE = 1024
_DENSE_ENTRIES = 2**23
"""Up to this size "auto" bounds a convolution by its matrix: exact, and fast enough."""


def upper_bound(W: Any, *, operator: Operator | None = None, method: str = "auto") -> Any:
    """An upper bound of the largest singular value of a weight: proven, rounding included.

    Never below the largest singular value of the very numbers handed over, whatever their dtype
    and scale, subnormal numbers included; `docs/bounds.md` says what the proofs assume.

    All but "gram" run on the host: W is copied there as it is, the shards of a sharded one put
    together, and widened to float64 slice by slice. "gram" runs where W is: of a W that is sharded
    along the larger of its two sides only Gram matrices, of the smaller, travel between devices;
    along the smaller side W itself is gathered.

    A zero weight gives 0. Where the bound is no float64 it is infinity.

    Args:
        W: The weight, a NumPy or JAX array in float64, float32, bfloat16, float16 or narrower.
        operator: How `W` is seen as a linear map, `Matrix` or `Conv`; `Matrix()` if None.
        method: One of

            - "auto": "cholesky" for a `Matrix` and for a small `Conv`, else "symbol".
            - "cholesky": one Cholesky factorization of the Gram matrix in float64, a relative
              1e-9 above the truth. For a `Conv` of its dense matrix: any padding, small inputs.
            - "symbol": for a `Conv`, the largest norm of its symbol over all frequencies: holds
              for every input size. Some 0.1 % above the norm at infinite size, exact for
              circular padding whose length the stride divides.
            - "gram": on the device of `W`, in float32, or float64 where JAX has it; works under
              `jit` and `grad`. For a `Conv` the reshaped kernel times the square root of its
              overlap, 3 for 3 x 3.

    Returns:
        Bounds of shape `(*batch)`, float64 on the host. If `W` is traced ("gram" only), an array
        in float32, or float64 for a float64 `W`, that is differentiable in `W` and is NaN where
        an entry is not finite.

    Raises:
        TypeError: If `W` is not real floating point, is traced for another method than "gram",
            or `operator` is neither `Matrix` nor `Conv`.
        ValueError: If `W` is empty or has entries that are not finite, `operator` does not fit
            it, or `method` does not fit `operator`.
        FloatingPointError: If the processor is in a mode that flushes subnormal numbers, or
            does not round to nearest.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, jsn
        >>> print(f"{jsn.upper_bound(np.diag([3.0, 2.0])):.6f}")
        3.000000
        >>> blur = jnp.ones((3, 3, 1, 1)) / 9
        >>> print(f"{jsn.upper_bound(blur, operator=jsn.Conv((64, 64, 1))):.3f}")
        1.001

    References:
        Rump 2006, Verification of positive definiteness, BIT 46,
        https://doi.org/10.1007/s10543-006-0056-1. Higham 2002, Accuracy and Stability of
        Numerical Algorithms. Duffin and Schaeffer 1938, Some properties of functions of
        exponential type. Delattre et al. 2023, https://arxiv.org/abs/2305.16173.
    """
    operator = Matrix() if operator is None else operator
    if not isinstance(operator, Matrix | Conv):
        raise TypeError(_errors.no_bound_for(_CALL, repr(operator)))
    check_weights([Leaf("", W, operator)], _CALL)
    method = _method(W, operator, method)
    if method == "gram":
        return _on_device(W, operator)
    check_arithmetic()
    if not getattr(W, "is_fully_addressable", True):
        raise ValueError(_errors.not_addressable(_CALL))
    weight = np.asarray(W)
    check_finite(weight)
    batch = operator.batch(weight.shape)
    bounds = np.empty(batch)
    one = _METHODS[type(operator), method]
    for index in np.ndindex(*batch):
        bounds[index] = one(operator, weight, index)
    return bounds[()]


def _method(W: Any, operator: Matrix | Conv, method: str) -> str:
    """The method to use.

    Raises:
        TypeError: If `W` is of a kind that this method does not take.
        ValueError: If there is no such method for this operator.
    """
    known = [name for kind, name in _METHODS if isinstance(operator, kind)]
    if method not in ("auto", "gram", *known):
        raise ValueError(_errors.bad_method(_CALL, method, str(operator), ["auto", "gram", *known]))
    if isinstance(W, Tracer) and method != "gram":
        raise TypeError(_errors.traced_bound(_CALL, method))
    if np.dtype(W.dtype).itemsize > 8:
        raise TypeError(_errors.too_wide(_CALL, str(W.dtype)))
    if method != "auto":
        return method
    if isinstance(operator, Matrix):
        return "cholesky"
    rows, columns = _window.dense_size(operator, W.shape)
    small = min(rows, columns) <= _DENSE_SIDE and rows * columns <= _DENSE_ENTRIES
    return "cholesky" if small else "symbol"


def check_finite(W: np.ndarray) -> None:
    """Raises where an entry is not finite.

    Raises:
        ValueError: If so, with their number and the place of the first.
    """
    wrong = ~np.isfinite(W)
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(_errors.not_finite(_CALL, int(wrong.sum()), W.size, first, str(W[first])))


# --- on the host, one batch entry at a time ---------------------------------------------------


def _peak_exponent(x: np.ndarray) -> int | None:
    """The exponent of the power of two just above all entries; None if all are 0."""
    peak = float(np.max(np.abs(x)))
    return math.frexp(peak)[1] if peak > 0 else None


def _matrix(operator: Matrix, W: np.ndarray, index: tuple[int, ...]) -> float:
    ins, outs, batch = operator._axes(W.ndim)
    H = W.transpose(*batch, *ins, *outs)[index]
    H = H.reshape(size(operator.domain(W.shape)), -1)
    exponent = _peak_exponent(H)
    if exponent is None:
        return 0.0
    return float_up(_certify.norm_bound(H, exponent) * power_of_two(exponent))


def _kernel(proven: Callable) -> Callable:
    """A method for one kernel with entries below 1, as a method for a weight."""

    def one(operator: Conv, W: np.ndarray, index: tuple[int, ...]) -> float:
        K = np.moveaxis(W, operator._batch, range(len(operator._batch)))[index]
        exponent = _peak_exponent(K)
        if exponent is None:
            return 0.0
        # What is dropped is a convolution too; in its matrix at most all taps meet.
        entries = size(operator.codomain(W.shape)) * size(operator.domain(W.shape))
        lost = dropped(entries) * size(K.shape[:-2])
        return float_up((proven(operator, scaled(K, exponent)) + lost) * power_of_two(exponent))

    return one


_METHODS: dict[tuple[type, str], Callable] = {
    (Matrix, "cholesky"): _matrix,
    (Conv, "cholesky"): _kernel(_window.dense_bound),
    (Conv, "symbol"): _kernel(_window.symbol_bound),
}


# --- on the device ------------------------------------------------------------------------------


def _on_device(W: Any, operator: Matrix | Conv) -> Any:
    """The method "gram": traced if `W` is, else finished on the host.

    Raises:
        ValueError: If a concrete `W` has entries that are not finite.
    """
    factor = _overlap(operator, W.shape)
    if isinstance(W, Tracer):
        bound = _gram.bound(*_as_matrices(W, operator), factor=factor)
        return jnp.max(bound, axis=-1) if isinstance(operator, Conv) else bound
    rest, shift = {}, {}
    if W.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        check_finite(np.asarray(W))
        W, rest, shift = _halved(np.asarray(W), operator)
    mantissa, exponent = (np.asarray(part) for part in _parts(jnp.asarray(W), operator))
    if np.isnan(mantissa).any():
        check_finite(np.asarray(W))
    bounds = np.empty(mantissa.shape)
    for index in np.ndindex(*bounds.shape):
        scale = power_of_two(int(exponent[index])) if mantissa[index] else 0
        entry = index[:-1] if isinstance(operator, Conv) else index
        norm = Fraction(float(mantissa[index])) * scale + rest.get(entry, 0)
        bounds[index] = float_up(norm * factor * power_of_two(shift.get(entry, 0)))
    return bounds.max(axis=-1) if isinstance(operator, Conv) else bounds[()]


def _halved(W: np.ndarray, operator: Matrix | Conv) -> tuple[np.ndarray, dict, dict]:
    """A float64 weight for a device that has float32: rounded, with a bound of what that leaves.

    Returns:
        The weight in float32, each batch entry scaled to entries of at most 1; and for each batch
        entry a bound of the norm of the rest, and the exponent of its scale.
    """
    axes = operator._batch if isinstance(operator, Conv) else operator._axes(W.ndim)[2]
    front = range(len(axes))
    high, rest, shift = np.zeros(W.shape, np.float32), {}, {}
    for index in np.ndindex(*operator.batch(W.shape)):
        part = np.moveaxis(W, axes, front)[index]
        shift[index] = _peak_exponent(part) or 0
        part = scaled(part, shift[index])
        np.moveaxis(high, axes, front)[index] = part
        largest = Fraction(float(np.max(np.abs(part - part.astype(np.float32)))))  # exact
        rest[index] = sqrt_up(Fraction(part.size)) * largest + dropped(part.size)
        rest[index] *= bool(part.any())
    return high, rest, shift


@functools.partial(jax.jit, static_argnums=1)
def _parts(W: Array, operator: Matrix | Conv) -> tuple[Array, Array]:
    return _gram.parts(*_as_matrices(W, operator))


def _as_matrices(W: Array, operator: Matrix | Conv) -> tuple[Array, tuple, tuple, tuple]:
    """A weight as matrices, with its input, output and batch axes; the last one counts groups."""
    if isinstance(operator, Matrix):
        return W, *operator._axes(W.ndim)
    W = jnp.moveaxis(W, operator._batch, range(len(operator._batch)))
    groups = operator.feature_group_count
    W = W.reshape(*W.shape[:-1], groups, W.shape[-1] // groups)
    batch = (*range(len(operator._batch)), W.ndim - 2)
    window = tuple(range(len(operator._batch), W.ndim - 3))
    if operator.transpose:
        return W, (W.ndim - 3,), (*window, W.ndim - 1), batch
    return W, (*window, W.ndim - 3), (W.ndim - 1,), batch


def _overlap(operator: Matrix | Conv, shape: tuple[int, ...]) -> Fraction:
    """What the norm of a layer can exceed that of its matrices by."""
    return Fraction(1) if isinstance(operator, Matrix) else _window.overlap(operator, shape)
