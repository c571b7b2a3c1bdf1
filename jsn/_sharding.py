"""Station 2, on many devices: where the block of a weight lives, and which shardings jsn keeps.

In: an operator, a weight's shape and its sharding. Out: the sharding of the block on its output
side, or why a weight cannot stay sharded as it is. Must not know trees, state or power iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from jsn import _errors
from jsn._conv import Conv
from jsn._operator import explicit_spec
from jsn._rules import Leaf
from jsn._types import Operator


def check_explicit(leaves: Sequence[Leaf], call: str) -> None:
    """Raises, all leaves at once, where a weight on an explicit mesh would have to be gathered.

    Raises:
        ValueError: If an operator cannot keep the sharding of its weight.
    """
    problems = []
    for leaf in leaves:
        if leaf.operator is None or isinstance(leaf.value, jax.ShapeDtypeStruct):
            continue
        if explicit_spec(leaf.value) is not None:
            what = problem(leaf.operator, np.ndim(leaf.value), jax.typeof(leaf.value).sharding.spec)
            problems += [(leaf.path, what)] if what else []
    if problems:
        raise ValueError(_errors.cannot_keep_sharding(call, problems))


def problem(operator: Operator, ndim: int, spec: PartitionSpec) -> str | None:
    """Says why a weight sharded like this cannot be tracked where it lies, or None if it can."""
    if getattr(spec, "unreduced", ()) or getattr(spec, "reduced", ()):
        return f"sharding {spec} holds sums that are not reduced yet"
    if isinstance(operator, Conv):
        kernel = [axis for axis in range(ndim) if axis not in operator._batch]
        grouped = operator.feature_group_count > 1
        whole = kernel if grouped else kernel[:-2]
        if any(axis < len(spec) and spec[axis] is not None for axis in whole):
            what = "a grouped kernel" if grouped else "the window of a kernel"
            return f"sharding {spec}, rule {operator}: {what} cannot be sharded"
    return None


def landing(operator: Operator, W: Any, u: Any) -> Sharding:
    """Where a block lives: as the output side of its weight does, read off the products."""
    z: Any = jax.eval_shape(lambda W, u: operator.matvec(W, operator.rmatvec(W, u)), W, u)
    return z.sharding


def block_sharding(
    operator: Operator, shape: tuple[int, ...], block: tuple[int, ...], sharding: Sharding
) -> Sharding:
    """Where a block lives, given where its weight does: on whatever mesh, arrays or not."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    typed = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )
    W = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(typed, sharding.spec))
    u = jax.ShapeDtypeStruct(block, np.float32, sharding=NamedSharding(typed, PartitionSpec()))
    with jax.sharding.use_abstract_mesh(typed):
        found: Any = landing(operator, W, u)
    return NamedSharding(mesh, found.spec, memory_kind=sharding.memory_kind)


def is_known(sharding: object) -> bool:
    """Whether a sharding says which axis lies where: those of named meshes and single devices."""
    return isinstance(sharding, NamedSharding | SingleDeviceSharding)
