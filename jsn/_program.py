"""Station 9, programs: a jaxpr, run on values instead of numbers.

In: a jaxpr, its constants, and values for its inputs. Out: values, or numbers where an output does
not depend on the input: those are computed as JAX computes them. Must not know the rules of
primitives, only which of them contain programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jsn import _arrange, _primitives
from jsn._value import Bounds, Value

_MOST_ROUNDS = 100_000
"""A loop of unknown length is given up after so many."""


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation of a jaxpr, and the one that called that jaxpr: one jaxpr may be called often."""

    inner: Any
    caller: Equation | None

    primitive = property(lambda self: self.inner.primitive)
    params = property(lambda self: self.inner.params)
    invars = property(lambda self: self.inner.invars)
    outvars = property(lambda self: self.inner.outvars)

    def __iter__(self) -> Iterator[Equation]:
        """This equation and its callers, from the inside."""
        here = self
        while here is not None:
            yield here
            here = here.caller


def run(bounds: Bounds, closed: Any, inputs: list, caller: Equation | None = None) -> list:
    """The outputs of a closed jaxpr."""
    jaxpr = closed.jaxpr
    variables, arrays = (*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *inputs)
    known: dict[Any, Any] = dict(zip(variables, arrays, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for inner in jaxpr.eqns:
        outputs = _run_one(bounds, Equation(inner, caller), [read(x) for x in inner.invars])
        known.update(zip(inner.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run_one(bounds: Bounds, equation: Equation, operands: list) -> list:
    name = equation.primitive.name
    depends = any(isinstance(x, Value) for x in operands)
    if name in _LOOPS:
        return _LOOPS[name](bounds, equation, operands) if depends else _compute(equation, operands)
    inner = _inner(equation)
    if inner is not None:
        return run(bounds, inner, operands, equation)
    if not depends:
        return _compute(equation, operands)
    return _primitives.apply(bounds, equation, operands)


def _inner(equation: Equation) -> Any:
    """The program that a primitive only calls: jit, custom_jvp, custom_vjp, remat.

    Rules of differentiation are not looked at: they say nothing about the function itself.
    """
    if equation.primitive.name not in _CALLS:
        return None
    keys = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next((equation.params[key] for key in keys if key in equation.params), None)
    return inner if inner is None or hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())


_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
     "custom_vjp_call_jaxpr", "composite", "remat", "remat2", "checkpoint"}
)  # fmt: skip


def _compute(equation: Equation, operands: list) -> list:
    """What does not depend on the input, as JAX computes it."""
    if not equation.outvars:
        return []
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # before jax 0.10
    found = equation.primitive.bind(*functions, *operands, **params)
    return list(found) if equation.primitive.multiple_results else [found]


# --- loops and branches -------------------------------------------------------------------------


def _scan(bounds: Bounds, equation: Equation, operands: list) -> list:
    """Round after round."""
    params, body = equation.params, equation.params["jaxpr"]
    # What is stacked has one more axis outside than inside.
    n_carry = _unstacked(equation.outvars, body.jaxpr.outvars)
    n_consts = _unstacked(equation.invars, body.jaxpr.invars) - n_carry
    consts, carry = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    xs = operands[n_consts + n_carry :]
    rows: list[list] = [[] for _ in equation.outvars[n_carry:]]
    length = params["length"]
    order = range(length)[::-1] if params["reverse"] else range(length)
    for i in order:
        out = run(bounds, body, [*consts, *carry, *(_row(bounds, x, i) for x in xs)], equation)
        carry = out[:n_carry]
        for row, y in zip(rows, out[n_carry:], strict=True):
            row.append(y)
    ys = [
        _stacked(bounds, row[::-1] if params["reverse"] else row, out)
        for row, out in zip(rows, equation.outvars[n_carry:], strict=True)
    ]
    return [*carry, *ys]


def _unstacked(outside: list, inside: list) -> int:
    return sum(x.aval.shape == y.aval.shape for x, y in zip(outside, inside, strict=True))


def _row(bounds: Bounds, x: Any, i: int) -> Any:
    if not isinstance(x, Value):
        return x[i]
    size = x.index[0].size
    return bounds.rearranged(x, np.arange(i * size, (i + 1) * size).reshape(x.shape[1:]))


def _stacked(bounds: Bounds, rows: list, out: Any) -> Any:
    """The outputs of all rounds, as one array."""
    if not any(isinstance(row, Value) for row in rows):
        return jnp.stack(rows) if rows else jnp.zeros(out.aval.shape, out.aval.dtype)
    size = int(np.prod(out.aval.shape[1:]))
    starts = [i * size for i in range(len(rows))]
    labels = np.arange(len(rows) * size).reshape(out.aval.shape)
    return _arrange.joined(bounds, rows, starts, labels, out.aval.dtype)


def _while(bounds: Bounds, equation: Equation, operands: list) -> list:
    """Round after round, as long as it does not depend on the input whether there is another."""
    params = equation.params
    n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    test_consts, body_consts = operands[:n_test], operands[n_test : n_test + n_body]
    carry = operands[n_test + n_body :]
    for _ in range(_MOST_ROUNDS):
        (more,) = run(bounds, test, [*test_consts, *carry], equation)
        if isinstance(more, Value):
            reason = "runs as often as x says"
            return _primitives.opaque(bounds, equation, [more, *operands], reason, own=True)
        if not more:
            return carry
        carry = run(bounds, body, [*body_consts, *carry], equation)
    return _primitives.opaque(bounds, equation, operands, "runs too long to be followed")


def _cond(bounds: Bounds, equation: Equation, operands: list) -> list:
    """The branch that is taken, if that does not depend on the input."""
    which, *rest = operands
    if isinstance(which, Value):
        reason = "chooses a branch as x says, which may jump"
        return _primitives.opaque(bounds, equation, operands, reason, own=True)
    branches = equation.params["branches"]
    branch = branches[min(max(int(which), 0), len(branches) - 1)]
    return run(bounds, branch, rest, equation)


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
