"""Station 5, after an update: limits on all the singular values of a weight.

In: a weight, its matrix view, a bound. Out: the weight with singular values `min(s, bound)`, or
pressed below the bound by a polynomial. Both are `W M(W^T W)`, so nothing is flattened but the
Gram matrix of the smaller side. Must not know about trees, updates or tracked state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jsn._block import identity
from jsn._operator import Matrix, contract
from jsn._types import Sigma, Weight

LARGEST_DROP = 19 / 81
"""The largest relative drop for which the soft cap is one: at `a k^2 = 1/3` its first polynomial
stops rising at the end of its range, and `3 t^2 - 3 t^3 + t^4` is 19/81."""


def clip(operator: Matrix, W: Weight, bound: Any) -> Weight:
    """The nearest weight of norm at most `bound`: singular values `min(s, bound)`."""
    W32, batch = _prepared(operator, W)
    peak = jnp.max(jnp.abs(W32), axis=tuple(a for a in range(W.ndim) if a not in batch))
    scale = lax.reduce_precision(peak, exponent_bits=8, mantissa_bits=0)  # a power of two
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    bound = jnp.broadcast_to(jnp.asarray(bound, W32.dtype), scale.shape) / scale

    def factor(gram: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
        values, vectors = jnp.linalg.eigh(gram)
        s = jnp.sqrt(jnp.maximum(values, 0))
        cap = bound[..., None]
        excess = jnp.where(s > cap, 1 - cap / jnp.where(s > cap, s, 1), values * 0)
        removed = _times(vectors * excess[..., None, :], jnp.swapaxes(vectors, -1, -2))
        return identity(gram) - removed

    factor_on = W32 / operator.spread(scale, W.shape)
    return (_on_smaller_side(operator, factor_on, factor) * operator.spread(scale, W.shape)).astype(
        W.dtype
    )


def soft_clip(operator: Matrix, W: Weight, bound: Any, reach: Any) -> Weight:
    """Takes singular values from [0, reach] into [0, bound], in order: x - a x^3, then x + a x^3.

    Nothing is promised where `bound` is below `(1 - LARGEST_DROP) * reach`, or W above `reach`.
    """
    W32, _ = _prepared(operator, W)
    shape = operator.batch(W.shape)
    bound, reach = (jnp.broadcast_to(jnp.asarray(x, W32.dtype), shape) for x in (bound, reach))
    t = _coupling(1 - bound / reach)[..., None, None]

    def factor(gram: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
        first = identity(gram) - t * gram
        return _times(first, identity(gram) + t * _times(_times(first, gram), first))

    spread = operator.spread(reach, W.shape)
    return (_on_smaller_side(operator, W32 / spread, factor) * spread).astype(W.dtype)


def _coupling(drop: Sigma) -> Sigma:
    """Solves 3 t^2 - 3 t^3 + t^4 = drop for t = a k^2 in [0, 1/3], by Newton's method."""
    drop = jnp.clip(drop, 0, LARGEST_DROP)
    t = jnp.sqrt(drop / 3)
    for _ in range(6):
        slope = 6 * t - 9 * t**2 + 4 * t**3
        t = t - (3 * t**2 - 3 * t**3 + t**4 - drop) / jnp.where(slope > 0, slope, 1)
    return t


def _prepared(operator: Matrix, W: Weight) -> tuple[Weight, tuple[int, ...]]:
    return W.astype(np.promote_types(W.dtype, np.float32)), operator._axes(W.ndim)[2]


def _times(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _on_smaller_side(operator: Matrix, W: Weight, factor: Callable[[Array], Array]) -> Weight:
    """Multiplies a weight by a function of its Gram matrix, on its smaller side."""
    ins, outs, batch = operator._axes(W.ndim)
    sizes = [math.prod(W.shape[axis] for axis in axes) for axes in (ins, outs)]
    side, other = (ins, outs) if sizes[0] <= sizes[1] else (outs, ins)
    gram = contract(W, W, (other, other), (batch, batch))  # (*batch, *side, *side)
    n, n_batch = min(sizes), len(batch)
    M = factor(gram.reshape(*gram.shape[:n_batch], n, n)).reshape(gram.shape)
    y = contract(
        W, M, (side, tuple(range(n_batch, n_batch + len(side)))), (batch, tuple(range(n_batch)))
    )
    order = (*batch, *other, *side)  # of the axes of y
    return jnp.transpose(y, [order.index(axis) for axis in range(W.ndim)])
