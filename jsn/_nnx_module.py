"""Station 7, behind `jsn.nnx`: what a wrapper has to know about nnx modules.

In: a module, a wrapper around it. Out: its parameters and what its layers declare about them; its
parts as seen through the wrapper; what a call on a copy has changed. Must not know what the wrapper
does to the copy.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flax import nnx, traverse_util

from jsn._operator import Matrix
from jsn._rules import Observed
from jsn._types import Operator

Path = tuple[Any, ...]
Find = Callable[[Any], Any]
"""Finds a part of a module, given the module or a copy of it."""


class Wrapper(Protocol):
    """What is needed of a wrapper: the module, and a way to run a function on a copy of it."""

    module: nnx.Module

    def _run(self, function: Find, advance: bool = True) -> Any:
        """Runs a function on the copy, and carries over what it changes."""
        ...


# --- paths -----------------------------------------------------------------------------------


def join(path: Path) -> str:
    """The path that rules see."""
    return "/".join(map(str, path))


def nested(flat: Mapping[Path, Any]) -> dict:
    """A nested dict, from one with paths as keys."""
    return traverse_util.unflatten_dict(dict(flat))


def unnested(tree: Mapping) -> dict[Path, Any]:
    """A dict with paths as keys, from a nested one."""
    return traverse_util.flatten_dict(tree)


# --- parameters, and what their layers declare ------------------------------------------------


def params_outside(module: nnx.Module, kind: type) -> dict[Path, nnx.Variable]:
    """The parameters of a module by path, without those of modules of some kind within it."""
    inner = [path for path, node in nnx.iter_graph(module) if isinstance(node, kind)]
    every = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {k: v for k, v in every if not any(k[: len(path)] == path for path in inner)}


def observe(module: nnx.Module) -> dict[str, Observed]:
    """The shapes and axes that layers declare for their kernels."""
    seen = (
        (join((*path, "kernel")), _declared(node))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Module)
    )
    return {path: observed for path, observed in seen if observed is not None}


def _declared(layer: nnx.Module) -> Observed | None:
    if isinstance(layer, nnx.Linear):
        return Observed((layer.in_features, layer.out_features), None)
    if isinstance(layer, nnx.LinearGeneral):
        batch = tuple(layer.batch_axis.values())
        n_batch, n_out = len(batch), len(layer.out_features)
        outs = tuple(range(-n_out, 0))
        operator = Matrix(in_axis=None, out_axis=outs, batch_axis=tuple(range(n_batch)))
        return Observed((*batch, *layer.in_features, *layer.out_features), operator)
    if isinstance(layer, nnx.Einsum):
        return Observed(tuple(layer.kernel_shape), _einsum_axes(layer.einsum_str))
    if isinstance(layer, nnx.Conv | nnx.ConvTranspose):
        return Observed(tuple(layer.kernel_shape), None)
    return None


def _einsum_axes(equation: str | None) -> Operator | None:
    """The matrix of an einsum layer, where its equation is known and makes one."""
    if not equation or "." in equation:
        return None
    x, kernel, y = equation.replace(" ", "").replace("->", ",").split(",")
    ins = [axis for axis, letter in enumerate(kernel) if letter not in y]
    outs = [axis for axis, letter in enumerate(kernel) if letter not in x]
    batch = [axis for axis, letter in enumerate(kernel) if letter in x and letter in y]
    exact = ins and outs and len({*ins, *outs, *batch}) == len(ins) + len(outs) + len(batch)
    return Matrix(in_axis=ins, out_axis=outs, batch_axis=batch) if exact else None


# --- reaching into a wrapped module ----------------------------------------------------------


class View:
    """A submodule of a wrapped module, reached through the wrapper: calls see normalized weights.

    It stands for what `find` returns, given the module or its normalized copy.
    """

    _wrapper: Wrapper
    _find: Find

    def __init__(self, wrapper: Wrapper, find: Find):
        vars(self).update(_wrapper=wrapper, _find=find)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper._run(lambda module: self._find(module)(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return part(self._wrapper, self._find, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._find(self._wrapper.module), name, value)

    def __getitem__(self, key: Any) -> Any:
        find = lambda module: self._find(module)[key]
        return _shown(self._wrapper, find, find(self._wrapper.module))

    def __len__(self) -> int:
        return len(self._find(self._wrapper.module))

    def __repr__(self) -> str:
        return f"spectrally normalized view of {self._find(self._wrapper.module)!r}"


def part(wrapper: Wrapper, find: Find, name: str) -> Any:
    """An attribute of a (sub)module: methods and properties run on normalized weights."""
    owner = find(wrapper.module)
    get = lambda module: getattr(find(module), name)
    static = inspect.getattr_static(type(owner), name, None)
    if name in vars(owner) or isinstance(static, staticmethod | classmethod):
        return _shown(wrapper, get, getattr(owner, name))
    if isinstance(static, property | functools.cached_property):
        return wrapper._run(get, advance=False)
    value = getattr(owner, name)
    if not callable(value):
        return value

    @functools.wraps(value)
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapper._run(lambda module: get(module)(*args, **kwargs))

    return method


def _shown(wrapper: Wrapper, find: Find, value: Any) -> Any:
    """Submodules as views, everything else, raw Variables among it, as it is."""
    return View(wrapper, find) if isinstance(value, nnx.Module) else value


# --- a copy of a module, and the module ---------------------------------------------------------


def nodes(module: nnx.Module) -> list[Any]:
    """All modules and other nnx objects within a module, and itself, children first."""
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Pytree)]


def run_on_copy(module: nnx.Module, copy: nnx.Module, function: Find) -> Any:
    """Runs a function on a copy that shares Variables with a module, and returns its result.

    What the function sets on the copy, it sets on the module: caches, sown values, flags.
    """
    pairs = list(zip(nodes(module), nodes(copy), strict=True))
    originals = {id(new): old for old, new in pairs}
    before = [dict(vars(new)) for _, new in pairs]
    result = function(copy)
    for (old, new), was in zip(pairs, before, strict=True):
        for name in was.keys() - vars(new).keys():
            delattr(old, name)
        for name, value in vars(new).items():
            if not str(name).startswith("_pytree__") and was.get(name, was) is not value:
                is_data = getattr(new, "_pytree__nodes", {}).get(name)
                value = originals.get(id(value), value)
                set_attribute(old, name, nnx.data(value) if is_data else value)
    return result


def set_attribute(node: Any, name: Any, value: Any) -> None:
    """Sets an attribute of an nnx object, or an element of an nnx.List (early flax 0.12)."""
    if isinstance(name, int):  # pragma: no cover - early flax 0.12 alone
        node[name] = value
    else:
        setattr(node, name, value)
