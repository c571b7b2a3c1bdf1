"""Station 2. A weight as a linear map: `Matrix`.

In: a weight, and which of its axes are input, output and batch. Out: products of the map and of
its transpose with blocks of vectors, contracted over the weight's own axes: nothing is flattened
or transposed. Must not know about rules, trees, power iteration or state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jsn import _errors
from jsn._types import Block, Operator, Sigma, Weight

Axes = int | Sequence[int]


def contract(
    x: Array, y: Array, contracting: tuple[Sequence[int], Sequence[int]], batch: tuple = ((), ())
) -> Array:
    """`lax.dot_general` in full precision: the only product jsn forms.

    On a mesh with explicit axes the result lives where its axes lived before, and where the
    operands disagree about a common axis, the smaller one moves.
    """
    dtype = np.promote_types(x.dtype, y.dtype)  # also where JAX promotes nothing by itself
    alone = x is not y and _has_no_free_axis(x, y, contracting, batch)
    x, y, out = _placed(x, y, contracting, batch)
    x, y = x.astype(dtype), y.astype(dtype)
    if alone:
        # Changes nothing, but keeps XLA:CPU from computing x once more within the sum of products:
        # of a column, as is the weight of a layer with one output, that takes 12 times as long.
        info = jnp.finfo(dtype)
        x = lax.reduce_precision(x, info.nexp, info.nmant)
    return lax.dot_general(
        x,
        y,
        (contracting, batch),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=out,
    )


def _has_no_free_axis(x: Array, y: Array, contracting: tuple, batch: tuple) -> bool:
    """Whether a product is one number for each batch entry."""
    used = [(*summed, *shared) for summed, shared in zip(contracting, batch, strict=True)]
    return all(
        n == 1 or axis in axes
        for z, axes in zip((x, y), used, strict=True)
        for axis, n in enumerate(z.shape)
    )


def explicit_spec(x: Array) -> list | None:
    """Where each axis of an array lives on a mesh with explicit axes; None without one."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    # A spec with unreduced axes refuses to be unpacked, in those JAX that have `partitions`.
    spec = getattr(sharding.spec, "partitions", sharding.spec)
    return [*spec, *[None] * (x.ndim - len(spec))]


def _placed(
    x: Array, y: Array, contracting: tuple, batch: tuple
) -> tuple[Array, Array, NamedSharding | None]:
    """Operands that agree on where their common axes live, and where their product lives."""
    x_spec, y_spec = explicit_spec(x), explicit_spec(y)
    if x_spec is None or y_spec is None:
        return x, y, None
    common = [*zip(*contracting, strict=True), *zip(*batch, strict=True)]
    if x.size < y.size:
        x_spec = _follow(x_spec, y_spec, [(j, i) for i, j in common])
        x = jax.sharding.reshard(x, PartitionSpec(*x_spec))
    else:
        y_spec = _follow(y_spec, x_spec, common)
        y = jax.sharding.reshard(y, PartitionSpec(*y_spec))
    spec = [x_spec[i] for i in batch[0]]
    for own, used in (
        (x_spec, (*contracting[0], *batch[0])),
        (y_spec, (*contracting[1], *batch[1])),
    ):
        spec += [axis for i, axis in enumerate(own) if i not in used]
    mesh = jax.typeof(x).sharding.mesh
    return x, y, NamedSharding(mesh, PartitionSpec(*spec))


def _follow(spec: list, leader: list, common: Sequence[tuple[int, int]]) -> list:
    """A spec that takes its common axes from the leader's, and frees those mesh axes elsewhere."""
    taken = {name for i, _ in common for name in _names(leader[i])}
    spec = [None if taken & set(_names(entry)) else entry for entry in spec]
    for i, j in common:
        spec[j] = leader[i]
    return spec


def _names(entry: Any) -> tuple:
    return entry if isinstance(entry, tuple) else (entry,) if entry is not None else ()


def _as_axes(name: str, axes: Axes | None) -> tuple[int, ...] | None:
    if axes is None and name != "batch_axis":
        return None
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)  # type: ignore
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):  # type: ignore
        raise ValueError(_errors.bad_axes(f"{name}={axes!r} is not made of integers"))
    return axes  # type: ignore


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight as a matrix from its input axes to its output axes.

    Axes are named as in `jax.nn.initializers`: `in_axis` are summed over when the layer is
    applied, `out_axis` index its output, and `batch_axis` index independent matrices (stacked
    layers, attention heads, experts), each with its own sigma. The default is the view of
    Miyato et al. for a Flax kernel: everything but the last axis is input.

    Args:
        in_axis: Input axes; None means all the rest.
        out_axis: Output axes; None means all the rest (only one of the two may be None).
        batch_axis: Batch axes.

    Raises:
        ValueError: If an axis is not an integer, if both `in_axis` and `out_axis` are None,
            or if one axis is named twice.

    Examples:
        >>> import jax, jsn
        >>> stack = jax.numpy.ones((3, 8, 4))  # three layers of 8 inputs and 4 outputs
        >>> state = jsn.init({"kernel": stack}, rules=[("kernel", jsn.Matrix(batch_axis=0))])
        >>> jsn.sigmas({"kernel": stack}, state)["kernel"].shape
        (3,)

    References:
        Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks,
        section 2.1, https://arxiv.org/abs/1802.05957
    """

    in_axis: Axes | None = None
    out_axis: Axes | None = -1
    batch_axis: Axes = ()

    def __post_init__(self):
        for name in ("in_axis", "out_axis", "batch_axis"):
            object.__setattr__(self, name, _as_axes(name, getattr(self, name)))
        if self.in_axis is None and self.out_axis is None:
            raise ValueError(_errors.bad_axes("in_axis and out_axis are both None"))
        named = [*(self.in_axis or ()), *(self.out_axis or ()), *self.batch_axis]  # type: ignore
        if len(set(named)) < len(named):
            raise ValueError(_errors.bad_axes(f"{self} names an axis twice"))

    def __repr__(self) -> str:
        def short(axes):
            return axes[0] if axes is not None and len(axes) == 1 else axes

        shown = [
            f"{field.name}={short(value)}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != _as_axes(field.name, field.default)  # type: ignore
        ]
        return f"Matrix({', '.join(shown)})"

    def _axes(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Input, output and batch axes of a weight of this rank, each in ascending order."""

        def resolve(axes):
            return tuple(sorted(axis % ndim for axis in axes))

        batch = resolve(self.batch_axis)
        ins = None if self.in_axis is None else resolve(self.in_axis)
        outs = None if self.out_axis is None else resolve(self.out_axis)
        rest = tuple(a for a in range(ndim) if a not in {*batch, *(ins or ()), *(outs or ())})
        return rest if ins is None else ins, rest if outs is None else outs, batch

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Says why a weight of this shape cannot be viewed this way, or None if it can."""
        ndim = len(shape)
        named = [*self.batch_axis, *(self.in_axis or ()), *(self.out_axis or ())]  # type: ignore
        for axis in named:
            if not -ndim <= axis < ndim:
                kind = next(
                    name
                    for name in ("in_axis", "out_axis", "batch_axis")
                    if axis in (getattr(self, name) or ())
                )
                if ndim < 2:
                    break
                return f"{kind} {axis} is out of range for {ndim} axes"
        if ndim < 2 + len(self.batch_axis):  # type: ignore
            return f"needs at least {2 + len(self.batch_axis)} axes"  # type: ignore
        ins, outs, batch = self._axes(ndim)
        if sorted((*ins, *outs, *batch)) != list(range(ndim)):
            return f"input {ins}, output {outs} and batch {batch} do not cover each axis once"
        if not ins or not outs:
            return f"no axis is left for the {'output' if ins else 'input'} side"
        if 0 in shape:
            return "is empty"
        return None

    def _sizes(self, shape: tuple[int, ...], which: int) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in self._axes(len(shape))[which])

    def domain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the input side."""
        return self._sizes(shape, 0)

    def codomain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the output side."""
        return self._sizes(shape, 1)

    def batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return self._sizes(shape, 2)

    def matvec(self, W: Weight, v: Block) -> Block:
        """Contracts a block with the input axes."""
        ins, _, batch = self._axes(W.ndim)
        return _apply(W, v, ins, batch)

    def rmatvec(self, W: Weight, u: Block) -> Block:
        """Contracts a block with the output axes."""
        _, outs, batch = self._axes(W.ndim)
        return _apply(W, u, outs, batch)

    def _ends_with_outputs(self, ndim: int, block: int) -> bool:
        """Whether `rmatvec` moves the block axis of what its product makes."""
        return _comes_first(ndim, self._axes(ndim)[1], block)

    def spread(self, values: Sigma, shape: tuple[int, ...]) -> Array:
        """Puts one value for each batch entry on the weight's own batch axes."""
        batch = self._axes(len(shape))[2]
        values = jnp.broadcast_to(values, self.batch(shape))
        return values.reshape([n if a in batch else 1 for a, n in enumerate(shape)])

    def lifted(self, axes: tuple[int, ...], ndim: int) -> Matrix:
        """The same view of a weight of rank `ndim` that has gained these batch axes."""
        if not axes:
            return self
        kept = [axis for axis in range(ndim) if axis not in axes]

        def move(inner):
            return None if inner is None else tuple(kept[axis] for axis in inner)  # also negative

        batch = (*axes, *move(self.batch_axis))  # type: ignore
        return Matrix(move(self.in_axis), move(self.out_axis), batch)


def _apply(W: Weight, x: Block, axes: tuple[int, ...], batch: tuple[int, ...]) -> Block:
    """Contracts the trailing axes of a block `(*batch, block, *axes)` with those axes of W."""
    n_batch = len(batch)
    x_axes = tuple(range(n_batch + 1, x.ndim))
    x_batch = tuple(range(n_batch))
    if _comes_first(W.ndim, axes, x.shape[n_batch]):
        y = contract(W, x, (axes, x_axes), (batch, x_batch))
        return jnp.moveaxis(y, -1, n_batch)
    return contract(x, W, (x_axes, axes), (x_batch, batch))


def _comes_first(ndim: int, axes: tuple[int, ...], block: int) -> bool:
    """Whether a weight is the first operand where these axes of it are contracted.

    XLA:CPU copies a weight of three or more axes transposed, unless the contracted axes end it
    and it comes first, or they begin it and it comes second. (Where several axes end it, that
    product is slower than the copy, except for a single vector.) It copies no matrix, but for 32
    vectors `u W^T` takes 1.3 to 1.4 times as long as `W u^T`.
    """
    return axes[-1] == ndim - 1 and (len(axes) == 1 or block == 1)


class Product(NamedTuple):
    """A block as a product makes it."""

    x: Array
    last: bool
    """Whether its block axis is the last one, and not the one after the batch axes.

    If so, all axes between those may have become one.
    """


def rmatvec(operator: Operator, W: Weight, u: Block) -> Product:
    """`operator.rmatvec`, with the block axis where the fastest product puts it.

    Wherever else it is wanted, XLA:CPU moves it in a pass of its own, or turns the product around.
    """
    own = getattr(operator, "rmatvec_as_made", None)
    if own is not None:
        return own(W, u)
    v, n_batch = operator.rmatvec(W, u), len(operator.batch(W.shape))
    if isinstance(operator, Matrix) and operator._ends_with_outputs(W.ndim, u.shape[n_batch]):
        return Product(_merged(jnp.moveaxis(v, n_batch, -1), n_batch), last=True)
    return Product(v, last=False)


_MERGED = 16
"""Blocks of at most so many vectors get one axis for all of a side: the Gram matrix of 16 vectors
of a 4 x 4 x 256 side then takes 0.8 of the time, of 32 it takes 1.4."""


def _merged(x: Array, n_batch: int) -> Array:
    """A block whose axis comes last, with one axis in place of those before it.

    For a sum over several axes XLA:CPU copies the block transposed. On a mesh they stay as they
    are: one of them may lie on several devices, and would have to be gathered.
    """
    if x.shape[-1] > _MERGED or not jax.typeof(x).sharding.mesh.empty:
        return x
    return x.reshape(*x.shape[:n_batch], size(x.shape[n_batch:-1]), x.shape[-1])


def size(shape: Sequence[int]) -> int:
    """Number of entries."""
    return math.prod(shape)
