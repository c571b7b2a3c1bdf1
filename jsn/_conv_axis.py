"""Station 2. One spatial axis of a convolution: where its windows lie, and what pads it.

In: the size of an axis, and window, stride, dilation and padding along it. Out: padding in the
terms of `lax`, forward and transposed, sizes, and what follows from how windows lie.
Must not know channels, kernels or operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Pads = tuple[tuple[int, int], ...]
WRAPS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


class Axis(NamedTuple):
    """How a layer treats one spatial axis: `fold(conv(extend(x)))`."""

    size: int
    window: int
    stride: int
    dilation: int
    padding: Any
    transpose: bool
    around: tuple[int, int]
    """Entries repeated on both sides of the input: circular and reflected padding."""
    pads: tuple[int, int]
    """Zeros on both sides of the, possibly dilated, input of the convolution."""
    back: tuple[int, int]
    """Zeros on both sides of its, possibly dilated, output, in the transpose."""
    conv: int
    """Size that the convolution gives."""
    out: int
    """Size that the layer gives: less where a circular transposed one is folded."""

    @classmethod
    def of(cls, n: int, k: int, stride: int, dilation: int, padding: Any, transpose: bool) -> Axis:
        """Resolves the padding of one axis: a word of Flax's, or (low, high)."""
        reach = (k - 1) * dilation + 1
        around, pads = (0, 0), padding
        if transpose and isinstance(padding, str):
            pads = _upsampling(reach, stride, padding)
        elif padding in WRAPS:
            around, pads = ((reach - 1) // 2, reach // 2), (0, 0)
        elif padding == "CAUSAL":
            pads = (reach - 1, 0)
        elif isinstance(padding, str):
            ((low, high),) = lax.padtype_to_pads((n,), (reach,), (stride,), padding)
            pads = (int(low), int(high))
        up, down = (stride, 1) if transpose else (1, stride)
        dilated = (n + sum(around) - 1) * up + 1
        conv = (dilated + sum(pads) - reach) // down + 1
        before = reach - 1 - pads[0]
        back = (before, dilated + reach - 2 - (conv - 1) * down - before)
        out = n * up if padding == "CIRCULAR" and transpose else conv
        return cls(n, k, stride, dilation, padding, transpose, around, pads, back, conv, out)

    @property
    def disjoint(self) -> bool:
        """Whether no two windows share an entry, and at least one lies inside as a whole.

        Then the map is a diagonal of blocks, and the reshaped kernel, one full block, has its
        norm.
        """
        if sum(self.around) or self.conv != self.out:
            return False
        if self.window > self.stride // math.gcd(self.stride, self.dilation):
            return False
        reach, low = (self.window - 1) * self.dilation, self.pads[0]
        if self.transpose:  # entry i of the input reaches i * stride + low - j * dilation
            ends = (i * self.stride + low for i in range(self.size))
            return any(reach <= end < self.conv for end in ends)
        starts = (i * self.stride - low for i in range(self.conv))
        return any(0 <= start < self.size - reach for start in starts)

    def contains(self, other: Axis) -> bool:
        """Whether the map on the smaller axis `other` is certainly a part of this one.

        It is where an input of the smaller one can be placed among zeros so that its windows
        stay on the grid: then the norm is at most that on this axis.
        """
        if other.size == self.size:
            return True
        if sum(self.around) or self.conv != self.out:
            return False
        shift = other.pads[0] - self.pads[0]
        more_in, more_out = self.size - other.size, self.conv - other.conv
        if self.transpose:
            shift, more_in, more_out = -shift, more_out, more_in
        return any(0 <= self.stride * a + shift <= more_in for a in range(more_out + 1))


def _upsampling(reach: int, stride: int, padding: str) -> tuple[int, int]:
    """How `lax.conv_transpose` pads the dilated input; Flax folds "CIRCULAR" out of "VALID"."""
    total, low = reach + stride - 2 + max(reach - stride, 0), reach - 1
    if padding == "SAME":
        total = reach + stride - 2
        low = reach - 1 if stride > reach - 1 else -(-total // 2)
    return low, total - low


def extend(x: Array, axes: Sequence[Axis]) -> Array:
    """The input, continued on both sides where the padding is circular or reflected."""
    if not any(sum(axis.around) for axis in axes):
        return x
    mode = WRAPS[axes[0].padding]
    return jnp.pad(x, ((0, 0), *(axis.around for axis in axes), (0, 0)), mode=mode)


def fold(y: Array, axes: Sequence[Axis]) -> Array:
    """The output of a circular transposed convolution, summed over its periods as Flax does."""
    if all(axis.conv == axis.out for axis in axes):
        return y
    extra = [-(axis.conv - axis.out) % (2 * axis.out) for axis in axes]
    y = jnp.pad(y, ((0, 0), *((-(-n // 2), n // 2) for n in extra), (0, 0)))
    for i, axis in enumerate(axes, 1):
        y = y.reshape(*y.shape[:i], -1, axis.out, *y.shape[i + 1 :]).sum(i)
    return y
