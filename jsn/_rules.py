"""Station 1. Which leaves of a tree are weights, and as which operator.

In: a tree of parameters and rules, pairs of a path pattern and an operator. Out: its leaves in
order, each with its path and its operator or None. Must not know what an operator computes.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

from jsn import _errors
from jsn._operator import Matrix
from jsn._types import Operator, PyTree

Rules = Sequence[tuple[str, Operator | Callable[[Any], Operator | None] | None]]


def _matrix_first_axis(leaf: Any) -> Matrix | None:
    """PyTorch's layout, outputs first; its one-axis weights are normalization scales."""
    return Matrix(out_axis=0) if np.ndim(leaf) >= 2 else None


FLAX: Rules = (
    (r"(^|/)(query|key|value)/kernel$", Matrix(in_axis=0, out_axis=None)),
    (r"(^|/)kernel$", Matrix()),
)
"""Flax layouts: every `kernel`, as the matrix from all but its last axis to its last axis.

The fan-out projections of Flax attention, `(in, heads, head_dim)`, map their first axis to the
rest. Biases, scales and embeddings are left alone.
"""

TORCH: Rules = ((r"(^|[/.])weight$", _matrix_first_axis),)
"""PyTorch layouts: every `weight` of at least two axes, as the matrix onto its first axis."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a tree: where it is, its value, and how it is seen."""

    path: str
    value: Any
    operator: Operator | None = None


def _is_box(node: Any) -> bool:
    """Metadata boxes (nn.Partitioned, nnx.Param) count as their one leaf."""
    return isinstance(node, meta.AxisMetadata | nnx.Variable)


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def flatten(tree: PyTree) -> tuple[list[Leaf], Callable[[Sequence[Any]], PyTree]]:
    """Splits a tree into leaves, boxes opened, and a function that rebuilds it.

    A None counts as a leaf, so that a tree and its state have the same paths. The function puts
    values back into their boxes, unless told not to; a None stays bare.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is None or _is_box(node)
    )
    leaves, boxes = [], []
    for keys, node in entries:
        inner, box = jax.tree.flatten(node) if _is_box(node) else ([node], None)
        if len(inner) != 1:  # an empty box
            inner, box = [None], None
        leaves.append(Leaf("/".join(map(_key, keys)), inner[0]))
        boxes.append(box)

    def rebuild(values: Sequence[Any], boxed: bool = True) -> PyTree:
        nodes = [
            box.unflatten([value]) if boxed and box is not None and value is not None else value
            for box, value in zip(boxes, values, strict=True)
        ]
        return treedef.unflatten(nodes)

    return leaves, rebuild


def _check(rules: Rules, call: str) -> list[tuple[re.Pattern, Any]]:
    problems, compiled = [], []
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(_errors.bad_rules(call, [f"found {type(rules).__name__}: {rules!r}"]))
    for index, rule in enumerate(rules):
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str)):
            problems.append(f"rule {index}: {rule!r} is not a pair (pattern, operator)")
            continue
        pattern, operator = rule
        known = operator is None or isinstance(operator, Operator) or callable(operator)
        if not known or isinstance(operator, type):  # Matrix, where Matrix() is meant
            problems.append(f"rule {index}, {pattern!r}: {operator!r} is no operator and not None")
        try:
            compiled.append((re.compile(pattern), operator))
        except re.error as error:
            problems.append(f"rule {index}: {pattern!r} is no regular expression ({error})")
    if problems:
        raise ValueError(_errors.bad_rules(call, problems))
    return compiled


def assign(params: PyTree, rules: Rules, call: str) -> tuple[list[Leaf], Callable]:
    """Flattens a tree and gives each leaf the operator of the first rule that matches its path.

    Raises:
        TypeError: If rules are no sequence, or a matched leaf is integer, boolean or complex.
        ValueError: If rules are malformed, one of the caller's own matches no leaf, a matched
            leaf cannot be viewed as its rule asks, or nothing at all is matched.
    """
    compiled = _check(rules, call)
    bare, rebuild = flatten(params)
    paths = [leaf.path for leaf in bare]
    own = [rule for rule in rules if rule not in (*FLAX, *TORCH)]
    idle = [p for p, _ in own if not any(re.search(p, path) for path in paths)]
    if idle:
        raise ValueError(_errors.unmatched_rules(call, idle, paths))
    leaves = [dataclasses.replace(leaf, operator=_first_match(leaf, compiled)) for leaf in bare]
    tracked = [leaf for leaf in leaves if leaf.operator is not None]
    odd = [leaf for leaf in tracked if not isinstance(leaf.operator, Operator)]
    if odd:
        gave = [f"{leaf.path}: its rule gave {leaf.operator!r}, no operator" for leaf in odd]
        raise ValueError(_errors.bad_rules(call, gave))
    if not tracked:
        raise ValueError(_errors.nothing_tracked(call, paths))
    check_weights(tracked, call)
    return leaves, rebuild


def covers(params: PyTree, rules: Rules | str) -> bool:
    """Whether rules give any leaf an operator; in place of "operators", those of Flax."""
    compiled = _check(FLAX if isinstance(rules, str) else rules, "jsn.init")
    return any(_first_match(leaf, compiled) is not None for leaf in flatten(params)[0])


def _first_match(leaf: Leaf, compiled: Sequence[tuple[re.Pattern, Any]]) -> Operator | None:
    found = next((op for pattern, op in compiled if pattern.search(leaf.path)), None)
    if found is None or leaf.value is None:
        return None
    return found if isinstance(found, Operator) else found(leaf.value)


def check_dtypes(leaves: Sequence[Leaf], call: str) -> None:
    """Raises, all leaves at once, where a tracked leaf is not a real floating point array.

    Raises:
        TypeError: If any leaf is not.
    """
    wrong = []
    for leaf in leaves:
        dtype = getattr(leaf.value, "dtype", None)
        if dtype is None:
            wrong.append((leaf.path, f"found {type(leaf.value).__name__}, which is no array"))
        elif not jnp.issubdtype(dtype, jnp.floating):
            wrong.append((leaf.path, f"found dtype {dtype}, shape {tuple(leaf.value.shape)}"))
    if wrong:
        raise TypeError(_errors.bad_dtype(call, wrong, len(leaves)))


def check_weights(leaves: Sequence[Leaf], call: str) -> None:
    """Raises, all leaves at once, where a tracked leaf is no weight or its view does not fit.

    Raises:
        TypeError: If a leaf is not a real floating point array.
        ValueError: If an operator does not fit its leaf's shape.
    """
    check_dtypes(leaves, call)
    wrong = []
    for leaf in leaves:
        shape = tuple(leaf.value.shape)
        what = leaf.operator.problem(shape)  # type: ignore
        if what is not None:
            wrong.append((leaf.path, f"shape {shape}, rule {leaf.operator}: {what}"))
    if wrong:
        raise ValueError(_errors.cannot_view(call, wrong, len(leaves)))


# --- what a model says about its own parameters ------------------------------------------------


class Observed(NamedTuple):
    """A parameter as its own layer sees it: one layer's shape, and its axes where it says so."""

    shape: tuple[int, ...]
    operator: Operator | None
    lifted: tuple[int, ...] | None = None
    """The axes that lifting has added, where the model tells them; else they are guessed."""


def refined(params: PyTree, observed: Mapping[str, Observed]) -> Rules:
    """FLAX, with the operators of one model: axes where layers tell them, lifted batch axes."""
    exact = []
    for leaf in flatten(params)[0]:
        found = next((op for pattern, op in FLAX if re.search(pattern, leaf.path)), None)
        seen = observed.get(leaf.path)
        if found is None or seen is None or leaf.value is None:
            continue
        operator = seen.operator or found
        if len(seen.shape) < 2:
            continue  # told by init, with the rule that asked for it
        shape = np.shape(leaf.value)
        lifted = seen.lifted
        if lifted is None:
            lifted = next(iter(lifted_axes(shape, seen.shape)), ())
        exact.append((f"^{re.escape(leaf.path)}$", operator.lifted(lifted, len(shape))))
    return (*exact, *FLAX)


def lifted_axes(outer: tuple[int, ...], inner: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The axes that lifting (nn.scan, nn.vmap, nnx.vmap) may have added: all that fit."""
    return [
        axes
        for axes in itertools.combinations(range(len(outer)), max(0, len(outer) - len(inner)))
        if tuple(n for axis, n in enumerate(outer) if axis not in axes) == inner
    ]
