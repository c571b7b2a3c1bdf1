"""Station 7. Reading a linen model: which of its weights is which linear map.

In: the calls of a running model, seen by a method interceptor. Out: for each weight its exact
operator, with the batch axes that lifted transforms have added, or why there is none.
Must not know any particular layer, nor state or normalization.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import struct
from flax.core import meta

from jsn import _linen_layers
from jsn._conv import Conv
from jsn._operator import Matrix, size
from jsn._rules import Leaf, Observed, Rules, flatten, lifted_axes
from jsn._types import Operator, PyTree
from jsn._uses import Uses

Run = Callable[[PyTree], Any]
"""Runs the model on a tree of parameters like its own; called under a trace, for its calls."""


class Report(NamedTuple):
    """What is to be told about one weight, and whether it is left alone."""

    path: str
    what: str
    alone: bool


class Seen(NamedTuple):
    """A parameter as its own module sees it."""

    shape: tuple[int, ...]
    owner: str
    known: bool
    """Whether the module is a layer that jsn knows."""
    views: tuple[Operator | str, ...]
    """What its calls make of it; a text says why it cannot be read, and a bias has none."""


class Reader:
    """A method interceptor that notes what each module makes of its own parameters."""

    def __init__(self, per_head: bool = False):
        """Attention is read as one joint map, or as one for each head."""
        self.seen: dict[str, Seen] = {}
        self._per_head = per_head
        self._wrappers: list[str] = []

    def __call__(
        self, call_next: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Runs a method, then looks at its module."""
        module = context.module
        wraps = isinstance(module, nn.WeightNorm | nn.SpectralNorm)
        self._wrappers += [type(module).__name__] * wraps
        result = call_next(*args, **kwargs)
        del self._wrappers[len(self._wrappers) - wraps :]
        if module.scope is not None:
            code = getattr(context.orig_method, "func", None)
            name, view = _linen_layers.read(module, code, args, kwargs, self._per_head)
            if self._wrappers and view is not None:
                view = f"{self._wrappers[-1]} changes it before the layer uses it"
            for own, value in module.variables.get("params", {}).items():
                leaves = flatten(value)[0]
                if not isinstance(value, Mapping) and len(leaves) == 1:
                    known = bool(name) and own in (name, "bias")
                    views = (view,) if view is not None and own == name else ()
                    seen = Seen(np.shape(leaves[0].value), type(module).__name__, known, views)
                    self._note("/".join((*module.scope.path, own)), seen)
        return result

    def _note(self, path: str, new: Seen) -> None:
        """The innermost call comes first: what lifts it has more axes, and other code."""
        old = self.seen.get(path)
        if old is None:
            self.seen[path] = new
        elif new.known and not old.known:
            self.seen[path] = new._replace(shape=old.shape)
        elif new.known:
            views = dict.fromkeys((*old.views, *new.views))
            self.seen[path] = old._replace(views=tuple(views))


class Reading:
    """A model that has been observed in one run, and can be run again where that leaves doubts."""

    def __init__(self, raw: PyTree, seen: Mapping[str, Seen], run: Run):
        """Takes the parameters, what a `Reader` saw, by path, and how to run the model."""
        self._rebuild: Callable
        self._leaves, self._rebuild = flatten(raw)
        self._seen, self._run = seen, run

    def observed(self) -> dict[str, Observed]:
        """What refines default rules: matrices that only layers can tell, and lifted axes."""
        found = {}
        for leaf in self._leaves:
            note = self._seen.get(leaf.path)
            if leaf.value is not None and note is not None:
                views = [x for x in note.views if isinstance(x, Matrix) and x != Matrix()]
                operator = views[0] if len(views) == 1 else None
                found[leaf.path] = Observed(note.shape, operator, self._lifted(leaf, note)[0])
        return found

    def rules(self, own: Rules = ()) -> tuple[Rules, list[Report]]:
        """A rule for each weight, after the caller's own, and what is to be told.

        Weights that have no exact operator are left alone. Those that the caller's own rules
        match are not looked at.
        """
        rules, reports = [*own], []
        for leaf in self._leaves:
            if leaf.value is None or any(re.search(pattern, leaf.path) for pattern, _ in own):
                continue
            operator, what = self._operator(leaf)
            if operator is not None or what:
                rules.append((_only(leaf.path), operator))
            if what:
                reports.append(Report(leaf.path, what, alone=operator is None))
        return tuple(rules), reports

    def _operator(self, leaf: Leaf) -> tuple[Operator | None, str]:
        """The operator of a leaf, None if it has none, and what is to be told about it."""
        note, ndim = self._seen.get(leaf.path), np.ndim(leaf.value)
        if note is None:
            return None, "this call does not use it" if ndim > 1 else ""
        if len(note.shape) < 2 or (note.known and not note.views):
            return None, ""  # a scale or a bias
        lifted, certain = self._lifted(leaf, note)
        if lifted is None:
            return None, f"its layer gets shape {note.shape}: it is changed on its way there"
        if not note.known:
            return None, self._unknown(leaf, note, lifted)
        operator, what = _agree(note)
        if operator is not None and not certain:
            what = f"its shape leaves open which axes are lifted: took {lifted}"
        return operator and operator.lifted(lifted, ndim), what

    # --- axes that nn.scan and nn.vmap have added -------------------------------------------------

    def _lifted(self, leaf: Leaf, note: Seen) -> tuple[tuple[int, ...] | None, bool]:
        """The axes that only the outside sees, and whether they are certain.

        None where shapes do not go together.
        """
        fits = lifted_axes(np.shape(leaf.value), note.shape)
        if len(fits) < 2:
            return next(iter(fits), None), True
        told = self._told.get(leaf.path)
        return (told, True) if told in fits else (fits[0], False)

    @functools.cached_property
    def _told(self) -> dict[str, tuple[int, ...]]:
        """Runs the model on boxes of metadata, which Flax tells about each lifted axis."""
        axes = {leaf.path: tuple(range(np.ndim(leaf.value))) for leaf in self._leaves}
        boxes = [
            None if leaf.value is None else _Box(leaf.value, leaf.path, axes[leaf.path])
            for leaf in self._leaves
        ]
        found: dict[str, tuple[int, ...]] = {}

        def look(call_next: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            result = call_next(*args, **kwargs)
            if context.module.scope is not None:
                for box in context.module.variables.get("params", {}).values():
                    if isinstance(box, _Box):
                        lifted = tuple(sorted({*axes[box.path]} - {*box.kept}))
                        found.setdefault(box.path, lifted)  # the innermost call comes first
            return result

        def run(boxes: PyTree) -> None:
            self._run(boxes)

        try:
            with nn.intercept_methods(look):
                jax.eval_shape(run, self._rebuild(boxes, boxed=False))
        except Exception:  # a model that cannot run on boxes: the axes are guessed, and told
            return {}
        return found

    # --- layers that jsn does not know --------------------------------------------------------

    @functools.cached_property
    def _uses(self) -> Uses:
        """What the program of the whole model does with its parameters."""
        held = [leaf.value for leaf in self._leaves if leaf.value is not None]

        def program(values: Sequence[Any]) -> None:
            rest = iter(values)
            filled = [None if leaf.value is None else next(rest) for leaf in self._leaves]
            self._run(self._rebuild(filled))

        return Uses(jax.make_jaxpr(program)(held), [np.ndim(value) for value in held])

    def _unknown(self, leaf: Leaf, note: Seen, lifted: tuple[int, ...]) -> str:
        """What to tell about a weight of a layer that jsn does not know: nothing, of an offset."""
        index = [x.path for x in self._leaves if x.value is not None].index(leaf.path)
        if self._uses.only_added(index):
            return ""
        what = f"{note.owner} is no layer that jsn knows"
        matrix = self._uses.matrix(index)
        if matrix is None:
            return what
        ins, outs = (  # type: ignore
            tuple(axis for axis in axes if axis not in lifted)  # type: ignore
            for axes in (matrix.in_axis, matrix.out_axis)
        )
        if not ins or not outs:
            return what
        view = Matrix(ins, outs, tuple(sorted({*matrix.batch_axis, *lifted})))  # type: ignore
        return f'{what}; its program uses it as ("{_only(leaf.path)}", jsn.{view})'


def _only(path: str) -> str:
    return f"^{re.escape(path)}$"


def _agree(note: Seen) -> tuple[Operator | None, str]:
    """One operator for all calls of a layer, if there is one, and what is to be told about it."""
    reasons = [view for view in note.views if isinstance(view, str)]
    if reasons:
        return None, reasons[0]
    convs = [view for view in note.views if isinstance(view, Conv)]
    if convs:
        largest = max(convs, key=lambda view: size(view.input_shape))
        inside = all(largest.contains(view, note.shape) for view in convs)
        shapes = " and ".join(str(view.input_shape) for view in convs)
        what = f"it convolves inputs of {shapes}: took {largest.input_shape}"
        return largest.simplest(note.shape), "" if inside else what
    if len(note.views) > 1:
        return None, f"its calls use it as {' and as '.join(map(str, note.views))}"
    return note.views[0], ""  # type: ignore


class _Box(struct.PyTreeNode, meta.AxisMetadata):  # type: ignore
    """A parameter in a box of metadata: Flax tells such boxes which axes it takes away."""

    value: Any
    path: str = struct.field(pytree_node=False)
    kept: tuple[int, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:  # pragma: no cover - parameters are not written
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> Any:  # pragma: no cover - at init alone
        del index, params
        return self

    def remove_axis(self, index: int, params: Any) -> Any:
        del params
        index %= len(self.kept)
        return self.replace(kept=(*self.kept[:index], *self.kept[index + 1 :]))

    def __jax_array__(self) -> Any:
        return self.value

    def __getattr__(self, name: str) -> Any:  # for code that reads raw variables
        return getattr(object.__getattribute__(self, "value"), name)
