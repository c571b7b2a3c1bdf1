"""Station 9. `lipschitz_bound`: a proven bound of the Lipschitz constant of a whole function.

In: a function and an example of its input. Out: the bound, and where it comes from. Here the
function is traced, and the result put into words; the analysis is in `_program`, what is known of
an array in `_value`. Must not know primitives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util

from jsn import _errors, _program
from jsn._value import Bounds, Known, Problem, Root, Value

_CALL = "jsn.lipschitz_bound"


class Step(NamedTuple):
    """One step of a function on the way to its bound.

    Attributes:
        source: File, line and function.
        layer: The path of the Flax module, if there is one.
        primitive: What JAX does there; the last one of an element-wise function.
        factor: The Lipschitz constant of this step alone.
        bound: That of everything up to its result.
    """

    source: str
    layer: str
    primitive: str
    factor: float
    bound: float


@overload
def lipschitz_bound(fn: Callable, x: Any, *, report: Literal[False] = False) -> float: ...
@overload
def lipschitz_bound(fn: Callable, x: Any, *, report: Literal[True]) -> tuple[float, list[Step]]: ...
def lipschitz_bound(
    fn: Callable, x: Any, *, report: bool = False
) -> float | tuple[float, list[Step]]:
    """An upper bound of the l2 Lipschitz constant of a JAX function: proven, for all inputs.

        |fn(x) - fn(y)| <= bound * |x - y|    for all x and y of this shape,

    in the norm over all entries, batch axis included. Where the function treats each example on
    its own, that is the constant for one example.

    The function is traced, and its primitives are followed one by one: linear ones with constant
    weights by `upper_bound`, element-wise ones together, as functions of one number, whose
    largest slope is proven by interval arithmetic; so activations need not be known by name.
    Softmax, log-sum-exp, norms, and normalizations with a floor are recognised from their
    arithmetic. Loops are followed round by round. Constants are multiplied and added exactly, and
    rounded up.

    The claim is about the function in real arithmetic: the rounding of `fn` itself, some 1e-6 in
    float32, is no part of it. What does not depend on `x`, such as the scale of a BatchNorm in
    evaluation, is computed by JAX, in its precision, and taken for exact. `stop_gradient` and
    custom derivatives change nothing: they are about derivatives, not about the function.

    Args:
        fn: A function of one argument, an array or a tree of arrays; so are its outputs, whose
            norm is that of all of them together.
        x: An example of its argument, or its shape and dtype (`jax.ShapeDtypeStruct`): the
            values do not matter.
        report: Whether to return the steps as well.

    Returns:
        The bound, 0 if the outputs do not depend on `x`. With `report` a pair: the bound, and a
        list of steps, each with its source line, its own constant and the bound so far.

    Raises:
        TypeError: If `x` is not made of real floating point arrays.
        ValueError: If no finite bound is known, with the primitive that is to blame and its
            source line: a function that is not Lipschitz, such as `x * x`, dot-product attention
            or a jump, or one that jsn cannot prove to be; or if a weight is not finite.

    Examples:
        >>> import jax, jax.numpy as jnp, jsn
        >>> W = jnp.diag(jnp.array([2.0, 1.0]))
        >>> net = lambda x: jax.nn.gelu(x @ W) @ W
        >>> print(f"{jsn.lipschitz_bound(net, jnp.ones((8, 2))):.3f}")  # 2 * 1.129 * 2
        4.516
        >>> print(f"{jsn.lipschitz_bound(lambda x: x + 0.5 * jnp.tanh(x), jnp.ones(3)):.3f}")
        1.500

    References:
        Gouk et al. 2018, Regularisation of Neural Networks by Enforcing Lipschitz Continuity,
        https://arxiv.org/abs/1804.04368 (composition). Kim et al. 2021, The Lipschitz Constant
        of Self-Attention, https://arxiv.org/abs/2006.04710 (it has none). Nair 2025, Softmax is
        1/2-Lipschitz, https://arxiv.org/abs/2510.23012.
    """
    leaves = jax.tree.leaves(x)
    _check_input(leaves)
    closed = jax.make_jaxpr(fn)(x)
    steps: list[Step] = []

    def note(equation: Any, factor: float, bound: float) -> None:
        if equation is not None and factor != 1:
            name = equation.primitive.name
            steps.append(Step(source(equation), layer(equation), name, factor, bound))

    bounds = Bounds(note)
    outputs = _program.run(bounds, closed, _inputs(bounds, leaves))
    values = [y for y in outputs if isinstance(y, Value)]
    known = bounds.joined([(y, np.ones(y.shape, int)) for y in values]) if values else Known(0.0)
    if math.isinf(known.bound):
        raise ValueError(_refusal(known.problem))
    return (known.bound, steps) if report else known.bound


def _check_input(leaves: list) -> None:
    """Raises where an input cannot be moved by a little.

    Raises:
        TypeError: If it is not a real floating point array.
    """
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    wrong = [str(dtype) for dtype in dtypes if not jnp.issubdtype(dtype, jnp.floating)]
    if wrong or not leaves:
        raise TypeError(_errors.not_moved(_CALL, ", ".join(wrong) or "no arrays"))


def _inputs(bounds: Bounds, leaves: list) -> list[Value]:
    """The inputs as parts of one array of constant 1."""
    sizes = [math.prod(np.shape(leaf)) for leaf in leaves]
    root, start, values = Root(sum(sizes), Known(1.0)), 0, []
    for leaf, size in zip(leaves, sizes, strict=True):
        index = np.arange(start, start + size, dtype=np.int32).reshape(np.shape(leaf))
        values.append(Value(root, bounds.pool.leaf, index))
        start += size
    return values


# --- in words -------------------------------------------------------------------------------------


def source(equation: _program.Equation) -> str:
    """Where an equation was written: in the user's own files, if any; else who called it."""
    frames = [
        frame
        for one in equation
        for frame in source_info_util.user_frames(one.inner.source_info.traceback)
    ]
    own = [frame for frame in frames if "site-packages" not in frame.file_name]
    if not frames:  # a function of JAX itself was passed
        return "a line of JAX's"
    frame = (own or frames)[0]
    return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"


def layer(equation: _program.Equation) -> str:
    """The path of the module that an equation belongs to, as Flax names it."""
    stacks = (str(one.inner.source_info.name_stack) for one in equation)
    return "/".join(reversed([stack for stack in stacks if stack]))


def _refusal(problem: Problem | None) -> str:
    if problem is None:
        return _errors.bound_overflows(_CALL)
    equation = problem.equation
    shapes = ", ".join(str(x.aval.str_short()) for x in equation.invars)
    name = equation.primitive.name
    return _errors.no_constant(
        _CALL, name, shapes, source(equation), layer(equation), problem.reason
    )
