"""Station 7. `operators`: the rules of a linen model, read from a run of it on shapes alone.

In: a model and what it is called with. Out: rules, and a warning about what has no exact
operator. Must not know state or normalization.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze
from flax.core.scope import DenyList

from jsn import _errors, _rules
from jsn._read_linen import Reader, Reading, Report
from jsn._rules import Rules
from jsn._types import PyTree


def operators(
    model: nn.Module,
    *args: Any,
    rules: Rules = (),
    per_head: bool = False,
    rngs: Any = None,
    **kwargs: Any,
) -> Rules:
    """Reads the exact operator of every weight from the model itself, and returns them as rules.

    The model is run once, on shapes alone. Its layers tell what a path cannot: a `jsn.Conv` has
    the input size, strides, padding, dilation and groups of its layer (and is a `jsn.Matrix` of
    the same norm where no two windows overlap, as for 1 x 1 kernels and patches); a
    `jsn.Matrix` has the axes that the layer contracts. Read are `nn.Dense`, `DenseGeneral`,
    `Einsum`, `Conv`, `ConvTranspose`, `Embed` (as the map of one-hot vectors), and so all of
    Flax's attention and recurrent cells. Each gate of a cell is a weight of its own. Axes added
    by `nn.scan` and `nn.vmap`, wherever they are, and the experts of a batched einsum or
    DenseGeneral, are batch axes: one sigma for each layer or expert.

    Nothing is skipped silently. What cannot be read exactly is left alone, with a rule None,
    and named in one `UserWarning` with what is known about it: layers with code of their own
    that do more with a parameter than add it, masked or locally connected convolutions,
    weights that `nn.WeightNorm` or an overridden `param` changes first. For those write rules,
    and pass them as `rules`.

    The norm of a convolution depends on the size of its input. Where one layer is called on
    several sizes the largest is taken; where the others are not sure to have at most its norm
    (circular or reflected padding, some strides), a warning says so.

    Args:
        model: A module, decorated or not.
        *args: What `model.init` is called with, after the PRNG keys; only shapes count, and
            `jax.ShapeDtypeStruct` serves for an array.
        rules: Rules of your own, put in front; the weights that they match are not read.
        per_head: Whether query, key, value and output of Flax's attention are normalized head
            by head. By default each is one joint map, of norm 1 over all of its heads.
        rngs: PRNG keys, if the model needs others than "params".
        **kwargs: As `args`; `method` too.

    Returns:
        Rules for `jsn.init`, `jsn.audit` and `spectral_norm`, one for each weight.

    Raises:
        TypeError: If `model` is no linen module, or `rules` is no sequence.
        ValueError: If `rules` are malformed.

    Examples:
        >>> import flax.linen as nn, jax.numpy as jnp, jsn
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        ...         return nn.Dense(10)(x.mean((1, 2)))
        >>> for rule in jsn.linen.operators(Net(), jnp.ones((1, 15, 15, 3))):
        ...     print(rule)
        ('^Conv_0/kernel$', Conv((15, 15, 3), strides=2))
        ('^Dense_0/kernel$', Matrix())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(_errors.not_a_model("jsn.linen.operators", describe(model)))
    _rules._check(rules, "jsn.linen.operators")
    rngs = {"params": jax.random.key(0)} if rngs is None else rngs
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}
    found: list[tuple[Rules, list[Report]]] = []

    def read(arrays: dict[int, Any]) -> None:
        args, kwargs = structure.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
        reader = Reader(per_head)
        with nn.intercept_methods(reader):
            variables = unfreeze(model.init(rngs, *args, **kwargs))
        raw = variables.pop("params", {})

        def run(tree: PyTree) -> Any:
            mutable = DenyList("params")
            return model.apply(
                {**variables, "params": tree}, *args, rngs=rngs, mutable=mutable, **kwargs
            )

        found.append(Reading(raw, reader.seen, run).rules(rules))

    jax.eval_shape(read, arrays)
    tell(found[-1][1])
    return found[-1][0]


def tell(reports: Sequence[Report]) -> None:
    """Warns, once for a model, of weights without an exact operator."""
    if reports:
        warnings.warn(_errors.not_exact(reports), UserWarning, stacklevel=3)


def describe(target: Any) -> str:
    """Something that should have been a module, in words."""
    if isinstance(target, nn.Module):
        return f"an instance of {type(target).__name__}"
    return f"{target!r} ({type(target).__name__})"
