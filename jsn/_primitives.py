"""Station 9, all other primitives: reductions, products, windows, sorting, conversions.

In: a primitive and its operands, values or constants. Out: its outputs. Must not know programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jsn import _arrange, _elementwise, _linear
from jsn._upward import plus, root, times
from jsn._value import MOST_DEPTH, Bounds, Known, Problem, Value


def apply(bounds: Bounds, equation: Any, operands: list) -> list:
    """The outputs of a primitive, at least one of whose operands depends on the input."""
    name = equation.primitive.name
    if all(0 in out.aval.shape for out in equation.outvars):
        return [np.zeros(out.aval.shape, out.aval.dtype) for out in equation.outvars]
    if _arrange.applies(name, operands):
        return _arrange.apply(bounds, equation, operands)
    if name in _elementwise.NAMES:
        return [_elementwise.apply(bounds, equation, operands)]
    if name in _SAME:
        return list(operands)
    if name in _RULES:
        return _RULES[name](bounds, equation, operands)
    return opaque(bounds, equation, operands, "is not supported")


def opaque(bounds: Bounds, equation: Any, operands: list, reason: str, own: bool = False) -> list:
    """Outputs of which nothing is known; fatal only if they reach the result.

    Args:
        bounds: The bounds found so far.
        equation: The primitive.
        operands: Its operands.
        reason: What is wrong with it.
        own: Whether it is to blame even where one of its operands has a problem of its own.
    """
    known = [bounds.known(x) for x in operands if isinstance(x, Value)]
    problems = [k.problem for k in known if k.problem is not None and not own]
    problem = problems[0] if problems else Problem(equation, reason)
    none = not any(k.bound for k in known)  # nothing depends on the input after all
    found = Known(0.0) if none else Known(math.inf, problem=problem)
    return [bounds.new(out.aval.shape, found, equation) for out in equation.outvars]


def _scaled(bounds: Bounds, equation: Any, x: Value, factor: float, *ends: float) -> list:
    """An output whose constant is that of x times a factor."""
    known = bounds.known(x)
    bound = times(factor, known.bound)
    bounds.note(equation, factor, bound)
    found = Known(bound, *(ends or (-math.inf, math.inf)), problem=known.problem)
    return [bounds.new(equation.outvars[0].aval.shape, found, equation)]


# --- products -------------------------------------------------------------------------------------


def _dot_general(bounds: Bounds, equation: Any, operands: list) -> list:
    which = [i for i, x in enumerate(operands) if isinstance(x, Value)]
    if len(which) == 1:
        W = operands[1 - which[0]]
        x = operands[which[0]]
        known = bounds.known(x)
        size = times(
            _linear.most(W, which[0], equation.params), max(abs(known.low), abs(known.high))
        )
        factor = _linear.dot_general(W, which[0], equation.params)
        return _scaled(bounds, equation, x, factor, -size, size)
    # A B + dA B + A dB: the norm of a bounded matrix is at most that of its entries.
    known = [bounds.known(x) for x in operands]
    batch, _ = equation.params["dimension_numbers"][1]
    sizes = []
    for x, k in zip(operands, known, strict=True):
        entries = math.prod(x.shape) // max(1, math.prod(operands[0].shape[a] for a in batch))
        sizes.append(times(max(abs(k.low), abs(k.high)), root(entries)))
    bound = plus(times(sizes[1], known[0].bound), times(sizes[0], known[1].bound))
    if math.isinf(bound):
        reason = "is a product of two arrays that both depend on x and are not both bounded"
        return opaque(bounds, equation, operands, reason)
    return [bounds.new(equation.outvars[0].aval.shape, Known(bound), equation)]


def _conv(bounds: Bounds, equation: Any, operands: list) -> list:
    x, W = operands
    if isinstance(W, Value):
        return opaque(bounds, equation, operands, "has a kernel that depends on x")
    factor = _linear.conv_general_dilated(x.shape, W, equation.params)
    if factor is None:
        return opaque(bounds, equation, operands, "has batch groups, or more than three axes")
    return _scaled(bounds, equation, x, factor)


def _one_operand(bounds: Bounds, equation: Any, operands: list) -> list:
    (x,) = operands
    name, params = equation.primitive.name, equation.params
    ends = bounds.range(x) if name in ("cummax", "cummin") else ()
    return _scaled(bounds, equation, x, _linear.ONE_OPERAND[name](x.shape, params), *ends)


def _reduce_window(bounds: Bounds, equation: Any, operands: list) -> list:
    x, *initial = operands
    inner = equation.params["jaxpr"].eqns
    names = {"add": "reduce_window_sum", "max": "reduce_window_max", "min": "reduce_window_max"}
    known = len(inner) == 1 and names.get(inner[0].primitive.name)
    if not known or len(operands) != 2 or not isinstance(x, Value) or isinstance(initial[0], Value):
        return opaque(bounds, equation, operands, "is not a sum or a maximum of one array")
    return _scaled(bounds, equation, x, _linear.ONE_OPERAND[known](x.shape, equation.params))


# --- reductions -----------------------------------------------------------------------------------


def _reduce(bounds: Bounds, equation: Any, operands: list) -> list:
    """A sum or a maximum over axes: one over groups, where the entries are distinct."""
    (x,), name = operands, equation.primitive.name
    axes = tuple(equation.params["axes"])
    shape = equation.outvars[0].aval.shape
    n = math.prod(x.shape[axis] for axis in axes)

    def otherwise() -> Known:
        known, (low, high) = bounds.known(x), bounds.range(x)
        if name == "reduce_sum":
            low, high = (
                float(np.nextafter(n * end, sign * np.inf)) for end, sign in ((low, -1), (high, 1))
            )
        factor = root(n) if name == "reduce_sum" else 1.0
        return Known(times(factor, known.bound), low, high, known.problem)

    grouped = bounds.group(x, axes) if x.expr.depth < MOST_DEPTH else None
    if grouped is None:
        return [bounds.new(shape, otherwise(), equation)]
    grouping, index = grouped
    pool, inner = bounds.pool, x.expr
    op = "group_sum" if name == "reduce_sum" else "group_max"
    inner = pool.make("neg", inner) if name == "reduce_min" else inner
    expr = pool.group(op, inner, grouping.number, grouping.size)
    expr = pool.make("neg", expr) if name == "reduce_min" else expr
    return [Value(x.root, expr, index, grouping, otherwise, equation)]


def _scatter_add(bounds: Bounds, equation: Any, operands: list) -> list:
    """Updates added up where they meet: at most k of them in one entry."""
    x, indices, updates = operands
    if isinstance(indices, Value):
        return opaque(bounds, equation, operands, "has indices that depend on x")
    counts = lax.scatter_add(
        jnp.zeros(equation.invars[0].aval.shape, jnp.int32),
        jnp.asarray(indices),
        jnp.ones(equation.invars[2].aval.shape, jnp.int32),
        equation.params["dimension_numbers"],
        mode=equation.params["mode"],
    )
    known = [bounds.known(v) if isinstance(v, Value) else Known(0.0) for v in (x, updates)]
    most = root(int(np.max(counts, initial=0)))
    bound = plus(known[0].bound, times(most, known[1].bound))
    problem = known[0].problem or known[1].problem
    return [bounds.new(counts.shape, Known(bound, problem=problem), equation)]


# --- sorting --------------------------------------------------------------------------------------


def _sort(bounds: Bounds, equation: Any, operands: list) -> list:
    """Sorting moves an array no further apart from another than it was.

    What is carried along is rearranged as the keys say: they must not depend on the input.
    """
    keys = equation.params["num_keys"]
    if not any(isinstance(x, Value) for x in operands[:keys]):
        return [_carried(bounds, equation, operands, i) for i in range(len(operands))]
    outputs = opaque(
        bounds, equation, operands, "carries an array along with keys that depend on x"
    )
    first = operands[0]
    if isinstance(first, Value):
        known = bounds.known(first)
        outputs[0] = bounds.new(first.shape, known, equation)
    return outputs


def _carried(bounds: Bounds, equation: Any, operands: list, which: int) -> Any:
    part = operands[which]
    inputs = [np.asarray(x) if not isinstance(x, Value) else np.zeros(x.shape) for x in operands]
    if not isinstance(part, Value):
        return equation.primitive.bind(*map(jnp.asarray, inputs), **equation.params)[which]
    inputs[which] = np.arange(part.index.size, dtype=np.int32).reshape(part.shape)
    labels = equation.primitive.bind(*map(jnp.asarray, inputs), **equation.params)[which]
    return bounds.rearranged(part, np.asarray(labels))


def _top_k(bounds: Bounds, equation: Any, operands: list) -> list:
    places = opaque(bounds, equation, operands, "gives places that jump")[1]
    known = bounds.known(operands[0])
    return [bounds.new(equation.outvars[0].aval.shape, known, equation), places]


# --- the same numbers -----------------------------------------------------------------------------


def _convert(bounds: Bounds, equation: Any, operands: list) -> list:
    """Another dtype; its rounding is not looked at, that to an integer is."""
    (x,), new = operands, np.dtype(equation.outvars[0].aval.dtype)
    old = np.dtype(equation.invars[0].aval.dtype)
    floating = [kind.kind in "fV" for kind in (old, new)]  # V: bfloat16 and narrower
    if new == old or all(floating) or (old.kind == "b" and floating[1]):
        return [x]
    what = "has no bound" if new.kind == "c" else "jumps"
    return opaque(bounds, equation, operands, f"converts {old} to {new}, which {what}")


def _jumps(bounds: Bounds, equation: Any, operands: list) -> list:
    return opaque(bounds, equation, operands, "jumps")


_SAME = frozenset(
    {"stop_gradient", "optimization_barrier", "reduce_precision", "sharding_constraint",
     "device_put", "reshard", "mesh_cast", "pvary"}
)  # fmt: skip
_RULES: dict[str, Callable[[Bounds, Any, list], list]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "reduce_window": _reduce_window,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "scatter_add": _scatter_add,
    "scatter-add": _scatter_add,
    "sort": _sort,
    "top_k": _top_k,
    "convert_element_type": _convert,
    **dict.fromkeys(_linear.ONE_OPERAND, _one_operand),
    **dict.fromkeys(("argmax", "argmin", "reduce_and", "reduce_or", "reduce_xor"), _jumps),
}
