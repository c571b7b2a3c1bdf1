"""Between stations: arrays laid side by side, and cut apart again.

In: arrays. Out: the same numbers in one array, or in many. What is laid side by side is cut apart
on the way back, and the other way round, so that either is compiled once, however many parts there
are. Must not know what the arrays hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jsn._operator import size


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def cut(arrays: Sequence[Array], batches: Sequence[tuple[int, ...]]) -> list[list[Array]]:
    """Cuts arrays apart: their first axis becomes the batch axes of one part after the other.

    XLA:CPU compiles a kernel for each slice, about 10 ms, but equal kernels only once. What makes
    them equal is that where a slice begins is data, hidden from the compiler. (It comes in a vector
    that is no progression: those, and scalars, are written into the kernel.)
    """
    if len(batches) == 1:
        return split(arrays, batches)
    starts = np.cumsum([0, *map(size, batches[:-1])])
    hidden = lax.optimization_barrier([np.array([n, 0, 1], np.uint32) for n in starts])
    parts = [_part(arrays, *place) for place in zip(hidden, batches, strict=True)]
    return [list(each) for each in zip(*parts, strict=True)]


@functools.partial(jax.jit, static_argnums=2)  # traced once for each shape
def _part(arrays: Sequence[Array], start: Array, batch: tuple[int, ...]) -> list[Array]:
    parts = []
    for x in arrays:
        inner = x.shape[1:]
        begin = (start[0], *(np.uint32(0) for _ in inner))
        part = lax.dynamic_slice(x, begin, (size(batch), *inner))
        parts.append(part.reshape(*batch, *inner))
    return parts


@cut.defjvp
def _(batches, primals, tangents):
    """On the way back one concatenation; sums of padded slices compile in quadratic time."""
    (arrays,), (changes,) = primals, tangents
    return cut(arrays, batches), split(changes, batches)


def split(arrays: Sequence[Array], batches: Sequence[tuple[int, ...]]) -> list[list[Array]]:
    """The same in the open: for parts that someone joins again, as if they had never been apart."""
    sizes = list(map(size, batches))
    return [
        [
            part.reshape(*batch, *part.shape[1:])
            for part, batch in zip(lax.split(x, sizes), batches, strict=True)
        ]
        for x in arrays
    ]


def join(arrays: Sequence[Array]) -> Array:
    """Stacks arrays along a new first axis; on the way back, the gradient is `cut`.

    The way back of `jnp.stack` slices in the open, and XLA compiles each of those by itself.
    """
    shape = jnp.shape(arrays[0])
    if len({jax.typeof(x) for x in arrays}) > 1:
        return jnp.stack(arrays)
    if not shape:
        return _join.bind(*[jnp.reshape(x, 1) for x in arrays])
    return _join.bind(*arrays).reshape(len(arrays), *shape)


_join = Primitive("join")
"""Concatenation along the first axis, with a transpose of its own.

A primitive, since neither `custom_vjp` nor `linear_call` knows both forward mode and `vmap`.
"""


def _concatenated(*arrays: Array) -> Array:
    return lax.concatenate(arrays, 0)


def _batched(arrays: Sequence[Array], axes: Sequence[int | None]) -> tuple[Array, int]:
    (n,) = {x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None}
    parts = [batching.bdim_at_front(x, axis, n) for x, axis in zip(arrays, axes, strict=True)]
    return _join.bind(*[jnp.swapaxes(x, 0, 1) for x in parts]), 1


def _transposed(change: Array, *arrays: Any) -> list[Array | None]:
    each = change.shape[0] // len(arrays)
    (parts,) = cut([change], [(each,)] * len(arrays))
    linear = [ad.is_undefined_primal(x) for x in arrays]
    return [part if x else None for part, x in zip(parts, linear, strict=True)]


_join.def_impl(jax.jit(_concatenated))
_join.def_effectful_abstract_eval(functools.partial(lax.concatenate_p.abstract_eval, dimension=0))
ad.deflinear2(_join, _transposed)
batching.primitive_batchers[_join] = _batched
mlir.register_lowering(_join, mlir.lower_fun(_concatenated, multiple_results=False))
