"""The true norms of the layers of a linen model: SVDs of the Jacobians of Flax's own layers.

Nothing here uses an operator of jsn's.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

_FLAT = (nn.Dense, nn.DenseGeneral)
_SPATIAL = (nn.Conv, nn.ConvTranspose)


def jacobian_norm(layer: nn.Module, params, example) -> float:
    """The largest singular value of a linear layer without its bias, on inputs of one shape."""
    shape, count = np.shape(example), math.prod(np.shape(example))
    apply = layer.clone(parent=None, name=None, use_bias=False).apply
    kernel = {"params": {"kernel": params["kernel"]}}
    units = np.eye(count, dtype=np.float32).reshape(count, *shape)
    rows = [apply(kernel, jnp.asarray(part)) for part in np.array_split(units, -(-count // 512))]
    dense = np.concatenate([np.asarray(row, np.float64).reshape(len(row), -1) for row in rows])
    return float(np.linalg.svd(dense, compute_uv=False)[0])


def layer_norms(model: nn.Module, variables, *args, **kwargs) -> dict[str, float]:
    """The norm of each Dense, DenseGeneral, Conv and ConvTranspose, at the sizes it is called on.

    Layers within a loop are not seen.
    """
    calls = {}

    def look(call_next, args, call_kwargs, context):
        module = context.module
        if isinstance(module, _FLAT + _SPATIAL) and context.method_name == "__call__":
            calls["/".join(module.scope.path)] = (module.clone(parent=None), np.shape(args[0]))
        return call_next(*args, **call_kwargs)

    with nn.intercept_methods(look):
        model.apply(variables, *args, **kwargs)
    norms = {}
    for path, (layer, shape) in calls.items():
        params = variables["params"]
        for key in path.split("/"):
            params = params[key]
        if isinstance(layer, _SPATIAL):
            own = shape[-len(layer.kernel_size) - 1 :]
        else:
            axes = getattr(layer, "axis", -1)
            own = shape[-(len(axes) if isinstance(axes, tuple) else 1) :]
        norms[path] = jacobian_norm(layer, params, np.empty(own))
    return norms
