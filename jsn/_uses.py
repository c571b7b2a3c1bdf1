"""Station 7. What a program does with its parameters, read from its jaxpr.

In: a jaxpr whose first inputs are parameters. Out: for each of them, whether the program only
moves it about and adds it to its data, or does more; and the matrix it is, where it is one.
Must not know any framework, nor compute anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from jsn._operator import Matrix

Origin = tuple[tuple[int, ...], ...] | None
"""The axes of a parameter that each axis of a value stands for; None once they are mixed up."""


class _Image(NamedTuple):
    """A value made of parameters alone, by moving them about."""

    params: frozenset[int]
    axes: Origin


_SAME = {"convert_element_type", "copy", "copy_p", "neg", "stop_gradient"}
_SAME |= {"sharding_constraint", "reshard", "mesh_cast"}
_MOVED = {"transpose", "squeeze", "broadcast_in_dim", "reshape"}
_PART = {"slice", "dynamic_slice", "gather", "rev", "split", "unstack", "pad", "tile"}
_JOINED = {"add", "sub", "add_any", "concatenate", "stack", "select_n"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def _operands_of_scan(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many it carries on."""
    if "ft_in" in params:  # pragma: no cover - JAX 0.12: a tree of constants, carry and inputs
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]


class Uses:
    """How the parameters of a program enter its products."""

    def __init__(self, closed: ClosedJaxpr, ndims: Sequence[int]):
        """Reads a program whose first inputs are parameters of these numbers of axes."""
        self._ndims = list(ndims)
        self._found: list[dict[Any, None]] = [{} for _ in ndims]
        jaxpr, env = closed.jaxpr, {}
        for param, (ndim, var) in enumerate(zip(ndims, jaxpr.invars, strict=False)):
            env[var] = _Image(frozenset([param]), tuple((axis,) for axis in range(ndim)))
        self._walk(jaxpr, env, {*jaxpr.invars[len(self._ndims) :], *jaxpr.constvars})

    def only_added(self, param: int) -> bool:
        """Whether a parameter is at most moved about and added to the data: an offset."""
        return not self._found[param]

    def matrix(self, param: int) -> Matrix | None:
        """The matrix as which a parameter multiplies the data, if it is always the same."""
        found = list(self._found[param])
        return found[0] if len(found) == 1 and isinstance(found[0], Matrix) else None

    def _walk(self, jaxpr: Jaxpr, env: dict[Var, _Image], data: set[Var]) -> None:
        """Follows images and data through a jaxpr, both extended in place."""
        for eqn in jaxpr.eqns:
            images = [None if isinstance(x, Literal) else env.get(x) for x in eqn.invars]
            from_data = [not isinstance(x, Literal) and x in data for x in eqn.invars]
            outs = self._equation(eqn, images, from_data) if any(images) else []
            env.update({v: image for v, image in zip(eqn.outvars, outs, strict=False) if image})
            if any(from_data):
                data.update(v for v in eqn.outvars if v not in env)

    def _equation(
        self, eqn: Any, images: list[_Image | None], from_data: list[bool]
    ) -> Sequence[_Image | None]:
        """The images that come out; what is no mere move is noted."""
        name = eqn.primitive.name
        found = [image for image in images if image is not None]
        params = frozenset[int]().union(*(image.params for image in found))
        if name in _SAME:
            return images[:1]
        if name in _PART:
            return [_Image(params, None)] * len(eqn.outvars)
        if name in _MOVED:
            return [_Image(params, _moved(name, eqn, found[0].axes))]
        if name in _JOINED:
            return [] if any(from_data) else [_Image(params, None)]
        if name == "scan" or name in _CALLS:
            return self._call(eqn, images, from_data)
        view = None
        if name == "dot_general" and len(params) == 1 and any(from_data):
            view = self._product(eqn, images)
        self._note(params, view or name)
        return []

    def _note(self, params: Iterable[int], use: Matrix | str) -> None:
        for param in params:
            self._found[param][use] = None

    def _call(
        self, eqn: Any, images: list[_Image | None], from_data: list[bool]
    ) -> Sequence[_Image | None]:
        """Follows images into a call or a scan, and out of a call."""
        params, scan = eqn.params, eqn.primitive.name == "scan"
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr") if key in params), None)
        jaxpr: Jaxpr = getattr(inner, "jaxpr", inner)  # type: ignore
        if scan:
            n_consts, n_carry = _operands_of_scan(params)
            first, carry = n_consts + n_carry, range(n_consts, n_consts + n_carry)
            from_data = [one or (i in carry and any(from_data)) for i, one in enumerate(from_data)]
            images = [_slice(x) if i >= first else x for i, x in enumerate(images)]
        env = {v: x for v, x in zip(jaxpr.invars, images, strict=True) if x is not None}
        self._walk(jaxpr, env, {v for v, one in zip(jaxpr.invars, from_data, strict=True) if one})
        outs = [None if isinstance(v, Literal) else env.get(v) for v in jaxpr.outvars]
        if not scan:
            return outs
        for image in filter(None, outs):
            self._note(image.params, "scan")
        return []

    def _product(self, eqn: Any, images: list[_Image | None]) -> Matrix | None:
        """The matrix that one operand of a product is, if its axes can still be told apart."""
        side = 0 if images[0] is not None else 1
        (param,), axes = images[side]  # type: ignore
        if axes is None:
            return None
        contracting, batch = (dims[side] for dims in eqn.params["dimension_numbers"])

        def pick(chosen: Iterable[int]) -> tuple[int, ...]:
            return tuple(axis for i in chosen for axis in axes[i])

        ins = pick(contracting)
        outs = pick(i for i in range(len(axes)) if i not in (*contracting, *batch))
        rest = tuple(axis for axis in range(self._ndims[param]) if axis not in (*ins, *outs))
        return Matrix(ins, outs, rest) if ins and outs else None


def _slice(image: _Image | None) -> _Image | None:
    """What a scan hands to each of its steps."""
    return image and image._replace(axes=image.axes and image.axes[1:])


def _moved(name: str, eqn: Any, axes: Origin) -> Origin:
    """Where the axes of a parameter go in a transpose, squeeze, broadcast or reshape."""
    if axes is None:
        return None
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if name == "squeeze":
        return tuple(x for i, x in enumerate(axes) if i not in eqn.params["dimensions"])
    if name == "broadcast_in_dim":
        to = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(to.get(i, ()) for i in range(len(after)))
    merged, rest = [], list(zip(before, axes, strict=True))
    for size in after:  # a reshape may merge neighbours, and add or remove axes of size 1
        have, taken = 1, ()
        while have < size and rest:
            n, axis = rest.pop(0)
            have, taken = have * n, taken + axis
        if have != size:
            return None
        merged.append(taken)
    return tuple(merged)
