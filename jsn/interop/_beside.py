"""Station 11, the part Flax and Haiku share: vectors in a tree of their own, beside parameters.

In: parameters, a tree with a `u` of shape `(1, n)` for some of them, and where a library puts
which. Out: what was found for each parameter; and that tree with new values. Must not know how a
library names things: a `Layout` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsn import _errors
from jsn._operator import Matrix
from jsn._rules import _is_box, flatten
from jsn._types import PyTree
from jsn.interop._blocks import Found, Triple, triples

Parts = tuple[str, ...]
"""A path, key by key; a key that holds several (`"Dense_0/kernel/u"`) counts as those."""


class Layout(NamedTuple):
    """Where a library keeps its vectors.

    `candidates` gives, for the path of a vector (without its last part) and the paths of all
    parameters, where its parameter may be: the first group with one that fits decides.
    """

    library: str
    u: str
    candidates: Callable[[Parts, Sequence[Parts]], Iterable[Sequence[Parts]]]
    fix: str


class Beside(NamedTuple):
    """A library's tree: its paths, its leaves, and how to put others in their place."""

    keys: list[Parts]
    values: list[Any]
    rebuild: Callable


def read(tree: PyTree) -> Beside:
    """Splits a tree into leaves by their paths."""
    entries = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or _is_box(x))
    leaves, rebuild = flatten(tree)
    return Beside([parts(path) for path, _ in entries[0]], [x.value for x in leaves], rebuild)


def parts(path: Iterable[Any]) -> Parts:
    """The keys of a JAX key path, one by one, as strings."""
    found: list[str] = []
    for entry in path:
        key = next((getattr(entry, k) for k in ("key", "name", "idx") if hasattr(entry, k)), entry)
        for name in key if isinstance(key, tuple) else (key,):
            found += str(name).split("/")
    return tuple(found)


def match(call: str, layout: Layout, params: PyTree, stats: PyTree) -> dict[Parts, str]:
    """The path of the parameter that each vector belongs to, by the path of the vector.

    Raises:
        ValueError: If there is no vector, or any of them has no parameter, several, or one that
            another has too.
    """
    keys, values, _ = read(params)
    shapes = {key: np.shape(x) for key, x in zip(keys, values, strict=True)}
    known = dict(zip(*read(stats)[:2], strict=True))
    # Any module may have a variable u: Flax's has a sigma beside it.
    us = {
        key[:-1]: tuple(np.shape(x))
        for key, x in known.items()
        if key[-1:] == (layout.u,) and (layout.u != "u" or (*key[:-1], "sigma") in known)
    }
    if not us:
        expected = f"a {layout.u!r} for each weight, as {layout.library} keeps it"
        fix = "For a model without it, make the state with jsn.init(params)."
        paths = ["/".join(key) for key in known]
        raise ValueError(_errors.nothing_imported(call, expected, paths, fix))
    where: dict[Parts, str] = {}
    problems = []
    for key, u in us.items():
        path, what = _choose(layout.candidates(key, keys), shapes, u)
        if not what and path in where.values():
            what = f"belongs to {path}, which has one already"
        problems += [("/".join((*key, layout.u)), f"shape {u}: {what}")] if what else []
        where[key] = path
    if problems:
        raise ValueError(_errors.bad_entries(call, problems, layout.fix))
    return where


def _choose(
    groups: Iterable[Sequence[Parts]], shapes: Mapping[Parts, tuple[int, ...]], u: tuple[int, ...]
) -> tuple[str, str]:
    """The path that a vector of this shape belongs to, or what is wrong."""
    misfits: dict[str, tuple[int, ...]] = {}
    for group in groups:
        here = {"/".join(path): shapes[path] for path in group if path in shapes}
        fitting = [path for path, shape in here.items() if _fits(u, shape)]
        if len(fitting) > 1:
            return "", f"may belong to {' or '.join(fitting)}"
        if fitting:
            return fitting[0], ""
        misfits |= here
    shown = ", ".join(f"{path} of shape {shape}" for path, shape in misfits.items())
    return "", f"does not fit {shown}" if shown else "there is no such parameter"


def _fits(u: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether u is `(*lifted, 1, n)` for a weight `(*lifted, ..., n)`."""
    n_lifted = len(u) - 2
    return 0 <= n_lifted <= len(shape) - 2 and u == (*shape[:n_lifted], 1, *shape[-1:])


def found(layout: Layout, stats: PyTree, where: Mapping[Parts, str]) -> dict[str, Found]:
    """What the library knows of each parameter, by its path.

    The view is the library's own, all axes but the last to the last; leading axes of `u` are
    those of lifted layers.
    """
    known = dict(zip(*read(stats)[:2], strict=True))
    us = {path: np.asarray(known[*key, layout.u]) for key, path in where.items()}
    return {path: Found(_view(u.ndim - 2), u) for path, u in us.items()}


def _view(n_lifted: int) -> Matrix:
    return Matrix(batch_axis=tuple(range(n_lifted)))


def write(
    call: str,
    layout: Layout,
    params: PyTree,
    state: Any,
    stats: PyTree,
    where: Mapping[Parts, str],
) -> Any:
    """The library's tree with every vector and sigma taken from a state.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If it does not fit the parameters, does not track the same weights as the
            tree, or in a way that the library does not have.
    """
    made = triples(call, params, state)[1]
    keys, values, rebuild = read(stats)
    lifted = {
        k[:-1]: np.ndim(x) - 2 for k, x in zip(keys, values, strict=True) if k[-1] == layout.u
    }
    wanted = {path: _view(lifted[key]) for key, path in where.items()}
    problems = [(path, "is not normalized by the state") for path in wanted if path not in made]
    problems += [
        (path, f"is not in the {layout.library} given") for path in made if path not in wanted
    ]
    problems += [
        (path, what)
        for path, view in wanted.items()
        if path in made and (what := other_view(made[path], view))
    ]
    if problems:
        raise ValueError(_errors.cannot_export(call, layout.library, problems))
    news: dict[Parts, Any] = {}
    for key, path in where.items():
        news[*key, layout.u] = np.expand_dims(made[path].u, -2)
        news[*key, "sigma"] = made[path].sigma
    return rebuild(
        [
            jnp.asarray(news[key], x.dtype) if key in news else x
            for key, x in zip(keys, values, strict=True)
        ]
    )


def other_view(triple: Triple, view: Matrix) -> str:
    """How a weight is seen, if not in this way, or an empty string."""
    shape, operator = np.shape(triple.weight), triple.operator
    if isinstance(operator, Matrix) and operator._axes(len(shape)) == view._axes(len(shape)):
        return ""
    return f"shape {shape} is seen as {operator}, expected {view}"
