"""Station 11, Equinox: models with eqx.nn.SpectralNorm layers.

In: such a model and its eqx.nn.State. Out: the model with the layers themselves in place of their
wrappers, and an `SNState`; and back. Equinox is imported only here, when it is used.

Layout, for a wrapper `sn` of a weight `(h, ...)`, seen as the matrix onto its first axis:

    getattr(sn.layer, sn.weight_name)    the raw weight
    eqx_state.get(sn.uv_index)           (u, v), of shapes (h,) and (w,)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsn import _errors
from jsn._operator import Matrix
from jsn._rules import _key, flatten
from jsn._types import PyTree, SNState
from jsn.interop._beside import other_view
from jsn.interop._blocks import Found, take_over, triples


def from_equinox(
    model: PyTree, eqx_state: Any, *, rules: Any = (), block_size: int = 1
) -> tuple[PyTree, SNState]:
    """Takes a model out of its `eqx.nn.SpectralNorm` wrappers.

    With `n_steps=0`, `jsn.normalize` then gives what the model computes in inference mode, if
    its weights have not moved since its last step.

    Args:
        model: The model.
        eqx_state: Its `eqx.nn.State`.
        rules: Pairs of a path pattern and an operator or None, which come before Equinox's own
            view. Patterns are matched with paths in the result.
        block_size: With 1, the `u` of Equinox is continued. With more, the state is made anew.

    Returns:
        The model with each wrapper replaced by the layer in it, which takes no state, and the
        SNState of that model.

    Raises:
        TypeError: If a weight is not real floating point.
        ValueError: If the state does not belong to the model, or there is no wrapper.
        ImportError: If Equinox is not installed.

    Examples:
        ```python
        import equinox as eqx, jax, jax.numpy as jnp, jsn

        def critic():
            k0, k1 = jax.random.split(jax.random.key(0))
            layer = eqx.nn.Linear(3, 4, key=k0)
            return eqx.nn.Sequential([eqx.nn.SpectralNorm(layer, "weight", key=k1)])

        wrapped, eqx_state = eqx.nn.make_with_state(critic)()
        model, state = jsn.interop.from_equinox(wrapped, eqx_state)
        normalized, state = jsn.normalize(model, state)
        y = normalized(jnp.ones(3))
        ```

    References:
        equinox/nn/_spectral_norm.py of Equinox 0.13.8.
    """
    call = "jsn.interop.from_equinox"
    split = _split(call, model)
    known, problems = {}, []
    for path, wrapper in split.wrappers.items():
        shape = np.shape(getattr(wrapper.layer, wrapper.weight_name))
        u = _tracked(eqx_state, wrapper)
        if u is None or u.shape != shape[:1]:
            what = "which is not in the state" if u is None else f"u of shape {u.shape}"
            problems.append((path, f"a wrapper of shape {shape}, {what}"))
        else:
            known[path] = Found(Matrix(out_axis=0), np.asarray(u)[None])
    if problems:
        fix = "Expected a model and the eqx.nn.State that eqx.nn.make_with_state made with it."
        raise ValueError(_errors.bad_entries(call, problems, fix))
    if not known:
        leaves = [leaf.path for leaf in flatten(model)[0]]
        fix = "For a model without it: jsn.init(model, rules=...)."
        raise ValueError(_errors.nothing_imported(call, "eqx.nn.SpectralNorm layers", leaves, fix))
    plain = split.rebuild(lambda wrapper, _: wrapper.layer)
    return plain, take_over(call, plain, known, rules, block_size)


def to_equinox(params: PyTree, state: Any, model: PyTree, eqx_state: Any) -> tuple[PyTree, Any]:
    """Puts a model and its state back into `eqx.nn.SpectralNorm` wrappers.

    Equinox always normalizes to 1: where you use another `bound`, or `soft`, or a `scale`, leave
    with `jsn.fold`.

    Args:
        params: The model without wrappers, as `from_equinox` gives it.
        state: Its state.
        model: The model with wrappers, as a template.
        eqx_state: The `eqx.nn.State` of the template. It stays usable.

    Returns:
        The model with wrappers, and its new `eqx.nn.State`.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If the model is not the template without wrappers; if the state and the
            template do not normalize the same weights, or Equinox cannot express an operator.
        ImportError: If Equinox is not installed.

    Examples:
        ```python
        import equinox as eqx, jax, jsn

        def critic():
            k0, k1 = jax.random.split(jax.random.key(0))
            layer = eqx.nn.Linear(3, 4, key=k0)
            return eqx.nn.Sequential([eqx.nn.SpectralNorm(layer, "weight", key=k1)])

        wrapped, eqx_state = eqx.nn.make_with_state(critic)()
        model, state = jsn.interop.from_equinox(wrapped, eqx_state)
        wrapped, eqx_state = jsn.interop.to_equinox(model, state, wrapped, eqx_state)
        ```

    References:
        equinox/nn/_spectral_norm.py of Equinox 0.13.8.
    """
    call = "jsn.interop.to_equinox"
    split = _split(call, model)
    layers = split.up_to(params)
    if layers is None:
        what = "the template's structure, with layers in place of their wrappers"
        raise ValueError(_errors.not_importable(call, what, "parameters of another structure"))
    made = triples(call, params, state)[1]
    wrapped = split.wrappers
    problems = [(path, "is not normalized by the state") for path in wrapped if path not in made]
    problems += [(path, "has no wrapper in the template") for path in made if path not in wrapped]
    problems += [
        (path, what)
        for path, triple in made.items()
        if path in wrapped and (what := other_view(triple, Matrix(out_axis=0)))
    ]
    if problems:
        raise ValueError(_errors.cannot_export(call, "equinox.nn.SpectralNorm", problems))
    new_state = jax.tree.unflatten(jax.tree.structure(eqx_state), jax.tree.leaves(eqx_state))
    for path, wrapper in wrapped.items():
        dtype = made[path].weight.dtype
        uv = tuple(jnp.asarray(x.reshape(-1), dtype) for x in (made[path].u, made[path].v))
        new_state = new_state.set(wrapper.uv_index, uv)

    def rewrap(wrapper: Any, layer: Any) -> Any:
        return wrapper if wrapper is layer else split.tree_at(lambda w: w.layer, wrapper, layer)

    return split.rebuild(rewrap, layers), new_state


class _Split(NamedTuple):
    """A model, cut at its wrappers."""

    wrappers: dict[str, Any]
    """By the path that the weight has in the model without wrappers."""
    leaves: list[Any]
    treedef: Any
    is_wrapper: Callable[[Any], bool]
    tree_at: Callable

    def up_to(self, params: PyTree) -> list[Any] | None:
        """The parts of another tree at the same places, or None if it has not the same form."""
        try:
            return self.treedef.flatten_up_to(params)
        except (ValueError, TypeError):
            return None

    def rebuild(self, put: Callable[[Any, Any], Any], others: list[Any] | None = None) -> PyTree:
        """The model with `put(wrapper, other)` for each wrapper, and the other leaves."""
        others = self.leaves if others is None else others
        return self.treedef.unflatten(
            [
                put(leaf, other) if self.is_wrapper(leaf) else other
                for leaf, other in zip(self.leaves, others, strict=True)
            ]
        )


def _split(call: str, model: PyTree) -> _Split:
    try:
        import equinox as eqx  # type: ignore
    except ImportError:
        raise ImportError(_errors.missing_package(call, "equinox", "reading its models")) from None

    def is_wrapper(x: Any) -> bool:
        return isinstance(x, eqx.nn.SpectralNorm)

    entries, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_wrapper)
    wrappers = {
        "/".join((*map(_key, path), leaf.weight_name)): leaf
        for path, leaf in entries
        if is_wrapper(leaf)
    }
    return _Split(wrappers, [leaf for _, leaf in entries], treedef, is_wrapper, eqx.tree_at)


def _tracked(eqx_state: Any, wrapper: Any) -> Any:
    """The u of a wrapper, or None if the state does not know it."""
    try:
        return eqx_state.get(wrapper.uv_index)[0]
    except (KeyError, AttributeError):
        return None
