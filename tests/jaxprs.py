"""What a program does, read off its jaxpr (equations, constants) or off what XLA makes of it."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.extend import core


def _inner(value) -> Iterator:
    """The jaxprs in an equation's parameter."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _inner(item)


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr, nested ones too, as often as they run.

    A loop without a static number of rounds counts as one.
    """
    for equation in jaxpr.eqns:
        yield equation
        for _ in range(equation.params["length"] if equation.primitive.name == "scan" else 1):
            for value in equation.params.values():
                for inner in _inner(value):
                    yield from equations(inner)


def trace(function, *args) -> list:
    """The equations of a function."""
    return list(equations(jax.make_jaxpr(function)(*args).jaxpr))


def count(function, *args) -> collections.Counter:
    """How often each primitive occurs."""
    return collections.Counter(equation.primitive.name for equation in trace(function, *args))


def reads(function, *args, size: int) -> int:
    """How many products have an operand of `size` entries: reads of a weight of that size."""
    return sum(
        equation.primitive.name in ("dot_general", "conv_general_dilated")
        and any(np.prod(operand.aval.shape) == size for operand in equation.invars)
        for equation in trace(function, *args)
    )


def largest_constant(function, *args) -> int:
    """The size of the largest array baked into the program."""

    def constants(closed):
        yield from closed.consts
        for equation in equations(closed.jaxpr):
            for value in equation.params.values():
                values = value if isinstance(value, tuple | list) else (value,)
                for item in values:
                    if isinstance(item, core.ClosedJaxpr):
                        yield from item.consts
            for operand in equation.invars:
                if isinstance(operand, core.Literal):
                    yield operand.val

    return max((np.size(c) for c in constants(jax.make_jaxpr(function)(*args))), default=0)


def fusions(function, *args):
    """What XLA has fused in a compiled function: the text of each fused computation."""
    program = jax.jit(function).lower(*args).compile().as_text()
    return re.findall(r"^%?fused_computation\S* [^\n]*\{\n(.*?)^\}", program, re.S | re.M)


def bytes_per_byte(function, params, state) -> float:
    """Bytes that the compiled function touches, for each byte of the parameters."""
    touched = jax.jit(function).lower(params, state).compile().cost_analysis()["bytes accessed"]
    return touched / sum(4 * leaf.size for leaf in jax.tree.leaves(params))


def reached(program: str, branches: bool) -> str:
    """The computations of a compiled program that run from its entry: all, or without branches."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", program, re.S | re.M))
    entry = re.search(r"^ENTRY %?([\w.-]+)", program, re.M)
    assert entry
    waiting, seen = [entry[1]], {}
    while waiting:
        name = waiting.pop()
        if name in seen or name not in bodies:
            continue
        lines = bodies[name].splitlines()
        if not branches:
            lines = [line for line in lines if "branch_computations" not in line]
        seen[name] = "\n".join(lines)
        waiting += re.findall(r"%([\w.-]+)", seen[name])
    return "\n".join(seen.values())
