"""Station 9, rearrangements: primitives whose outputs are entries of their inputs, or constants.

In: a primitive and its operands, values or constants. Out: a value. Must not know what values are
functions of.

Each entry of each operand gets a label, and the primitive itself moves the labels: reshape,
transpose, slice, gather, concatenate, pad, scatter, a selection by a constant mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jsn._value import Bounds, Value

# Operands that are moved; the others say where to, and have to be constants.
_FIRST = slice(0, 1)
_MOVED: dict[str, slice] = {
    "reshape": _FIRST, "transpose": _FIRST, "squeeze": _FIRST, "expand_dims": _FIRST,
    "broadcast_in_dim": _FIRST, "slice": _FIRST, "rev": _FIRST, "split": _FIRST,
    "dynamic_slice": _FIRST, "gather": _FIRST, "copy": _FIRST, "copy_p": _FIRST, "tile": _FIRST,
    "unstack": _FIRST, "stack": slice(None),
    "concatenate": slice(None), "pad": slice(None), "dynamic_update_slice": slice(0, 2),
    "scatter": slice(0, 3, 2), "select_n": slice(1, None),
}  # fmt: skip


def applies(name: str, operands: list) -> bool:
    """Whether a primitive with these operands is a rearrangement."""
    if name not in _MOVED:
        return False
    moved = operands[_MOVED[name]]
    rest = [x for i, x in enumerate(operands) if i not in range(*_MOVED[name].indices(99))]
    return bool(moved) and not any(isinstance(x, Value) for x in rest)


def apply(bounds: Bounds, equation: Any, operands: list) -> list:
    """The values of a rearrangement."""
    name, moved = equation.primitive.name, _MOVED[equation.primitive.name]
    places = range(*moved.indices(len(operands)))
    inputs, start, starts = list(operands), 0, []
    for i in places:
        shape = np.shape(operands[i]) if not isinstance(operands[i], Value) else operands[i].shape
        size = math.prod(shape)
        inputs[i] = np.arange(start, start + size, dtype=np.int32).reshape(shape)
        starts.append(start)
        start += size
    parts, dtype = [operands[i] for i in places], equation.outvars[0].aval.dtype
    if equation.params.get("fill_value") is not None:  # a gather's, where an index is out of bounds
        parts.append(np.asarray(equation.params["fill_value"], dtype))
        starts.append(start)
    outputs = _fast(name, equation.params, inputs)
    if outputs is None:
        outputs = _by_primitive(equation, inputs, start)
    return [joined(bounds, parts, starts, np.asarray(out), dtype, equation) for out in outputs]


def joined(
    bounds: Bounds,
    parts: list,
    starts: list[int],
    labels: np.ndarray,
    dtype: Any,
    equation: Any = None,
) -> Any:
    """The array whose entries are those of the parts with these labels."""
    of = np.searchsorted(starts, labels, side="right") - 1
    used = [int(i) for i in np.unique(of)]
    dependent = [i for i in used if isinstance(parts[i], Value)]
    if not dependent:
        return _constant(parts, starts, labels, of, dtype)
    if dependent == used and _alike([parts[i] for i in used]):
        return _one_function(bounds, parts, starts, used, labels, of)
    counted = []
    for i in dependent:
        size = parts[i].index.size
        counts = np.bincount(labels[of == i] - starts[i], minlength=size)
        counted.append((parts[i], counts.reshape(parts[i].shape)))
    known = bounds.joined(counted)
    constants = [np.asarray(parts[i]).astype(np.float64) for i in used if i not in dependent]
    low = float(np.min([known.low, *(x.min() for x in constants)]))  # NaN if there is one
    high = float(np.max([known.high, *(x.max() for x in constants)]))
    if math.isnan(low):
        low, high = -math.inf, math.inf
    return bounds.new(labels.shape, known._replace(low=low, high=high), equation)


def _alike(parts: list[Value]) -> bool:
    """Whether values are the same function of one root, though of other entries."""
    first = parts[0]
    return all(
        part.root is first.root and part.expr is first.expr and part.grouping is first.grouping
        for part in parts
    )


def _one_function(
    bounds: Bounds,
    parts: list,
    starts: list[int],
    used: list[int],
    labels: np.ndarray,
    of: np.ndarray,
) -> Value:
    """Parts that are the same function of one root, as one value."""
    if len(used) == 1:
        return bounds.rearranged(parts[used[0]], labels - starts[used[0]])
    index = np.zeros(labels.shape, np.int32)
    counted = []
    for i in used:
        own = labels[of == i] - starts[i]
        index[of == i] = parts[i].index.ravel()[own]
        counts = np.bincount(own, minlength=parts[i].index.size)
        counted.append((parts[i], counts.reshape(parts[i].shape)))
    first, otherwise = parts[used[0]], lambda: bounds.joined(counted)
    return Value(first.root, first.expr, index, first.grouping, otherwise, first.equation)


def _constant(parts: list, starts: list[int], labels: np.ndarray, of: np.ndarray, dtype) -> Any:
    """An array into which no value found its way."""
    found = np.zeros(labels.shape, dtype)
    for i, part in enumerate(parts):
        if not isinstance(part, Value):
            found[of == i] = np.asarray(part).ravel()[labels[of == i] - starts[i]]
    return found


def _by_primitive(equation: Any, inputs: list, fill: int) -> list:
    """What the primitive makes of labels; `fill` is that of entries out of bounds."""
    params = dict(equation.params)
    if params.get("fill_value") is not None:
        params["fill_value"] = fill
    if equation.primitive.name == "scatter":
        params.update(update_jaxpr=None, update_consts=())
    found = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
    return list(found) if equation.primitive.multiple_results else [found]


def _fast(name: str, params: dict, inputs: list) -> list | None:
    """By numpy, which need not compile: the most common ones; None for others."""
    one: Callable[..., list] | None = _NUMPY.get(name)
    return one(params, *inputs) if one is not None else None


def _broadcast_in_dim(params: dict, x: np.ndarray, *_) -> list:
    shape = [1] * len(params["shape"])
    for axis, at in enumerate(params["broadcast_dimensions"]):
        shape[at] = x.shape[axis]
    return [np.broadcast_to(x.reshape(shape), params["shape"])]


def _slice(params: dict, x: np.ndarray) -> list:
    strides = params["strides"] or (1,) * x.ndim
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return [x[tuple(slice(*end) for end in ends)]]


def _split(params: dict, x: np.ndarray) -> list:
    return np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"])


def _squeeze(params: dict, x: np.ndarray) -> list:
    return [np.squeeze(x, tuple(params["dimensions"]))]


_NUMPY: dict[str, Callable[..., list]] = {
    "reshape": lambda params, x, *_: [x.reshape(params["new_sizes"])],
    "transpose": lambda params, x: [x.transpose(params["permutation"])],
    "rev": lambda params, x: [np.flip(x, params["dimensions"])],
    "concatenate": lambda params, *xs: [np.concatenate(xs, params["dimension"])],
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "copy": lambda params, x: [x],
    "copy_p": lambda params, x: [x],
}
