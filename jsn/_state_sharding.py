"""Station 6, on many devices: `state_sharding`, where the state of sharded parameters lives.

In: the shardings of parameters, and the parameters and their state, or their shapes. Out: a
sharding for each block. Must not know how blocks are computed, nor any framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jsn import _errors
from jsn._normalize import _match
from jsn._rules import flatten
from jsn._sharding import block_sharding, is_known, problem
from jsn._types import PyTree, SNState


def state_sharding(
    params_sharding: PyTree, params: PyTree, state: SNState | Mapping[str, Any]
) -> Any:
    """Where each block of a state lives, given where the parameters do.

    A block lives as the output side of its weight does, so a step sends nothing but reductions
    of blocks. `jax.jit(jsn.init)` of sharded parameters finds such shardings by itself; this
    function gives them by name, before there is an array: for `out_shardings`, for
    `jax.device_put`, and for restoring a checkpoint on another mesh.

    Args:
        params_sharding: The sharding of each parameter, in a tree of the same paths, or in a
            prefix of it; what `nn.get_sharding`, `nn.logical_to_mesh_sharding` and
            `nnx.get_named_sharding` return. Leaves that are not tracked may have any value.
        params: The parameters, or their shapes (`jax.eval_shape`).
        state: Their state, a linen collection of it, or its shapes:
            `jax.eval_shape(jsn.init, params)`.

    Returns:
        `state`, with a sharding in place of each block.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If the state does not fit the parameters, or a tracked weight has no
            sharding, one without names, or one that jsn cannot keep (the window of a
            convolution, a grouped kernel, sums not reduced yet); naming every such leaf.

    Examples:
        >>> import jax, jsn
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> params = {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}
        >>> state = jax.eval_shape(jsn.init, params)
        >>> sharding = {"kernel": NamedSharding(mesh, P("data", "model"))}
        >>> print(*jsn.state_sharding(sharding, params, state).u["kernel"].spec)
        None model
    """
    call = "jsn.state_sharding"
    leaves, _, us, replace = _match(params, state, call)
    given = {leaf.path: leaf.value for leaf in flatten(params_sharding)[0]}
    found, problems = {}, []
    for leaf in leaves:
        if leaf.operator is None:
            continue
        sharding = _nearest(given, leaf.path)
        shape, block = np.shape(leaf.value), np.shape(us[leaf.path])
        if not is_known(sharding):
            what = "no sharding" if sharding is None else f"found {sharding!r}"
        else:
            spec = getattr(sharding, "spec", None)
            what = None if spec is None else problem(leaf.operator, len(shape), spec)
        if what is None:
            found[leaf.path] = block_sharding(leaf.operator, shape, block, sharding)  # type: ignore
        else:
            problems.append((leaf.path, what))
    if problems:
        raise ValueError(_errors.cannot_keep_sharding(call, problems))
    return replace(found)


def _nearest(given: Mapping[str, Any], path: str) -> Any:
    """What a tree prefix has for a path."""
    while path not in given and path:
        path = path.rpartition("/")[0]
    return given.get(path)
