"""Station 11, Flax: the state of linen's and of nnx's own SpectralNorm.

In: parameters, and the statistics that Flax keeps beside them. Out: an `SNState`; and back.

Layouts, for a weight `(..., n)`; both see it as the matrix from all axes but the last to the last:

    flax.linen    batch_stats[*scope]["name/kernel/u"]                (1, n)
                  batch_stats[*scope]["name/kernel/sigma"]            ()
    flax.nnx      wrapper.batch_stats[("kernel", "u")]                (1, n), a BatchStat
                  wrapper.batch_stats[("kernel", "sigma")]            (), a BatchStat
                  wrapper.layer_instance.kernel                       a Param

In linen, `scope` is that of the SpectralNorm module, and `name` that of the layer it wraps, whose
parameters lie in the same scope or in one around it. Under `nn.scan` and `nn.vmap` both have
leading axes more. Every leaf of two axes or more is normalized, attention biases included.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jsn import _errors
from jsn._rules import _is_box, flatten
from jsn._types import PyTree, SNState
from jsn.interop._beside import Layout, Parts, found, match, write
from jsn.interop._blocks import expect_mapping, take_over


def from_flax_linen(
    params: PyTree, batch_stats: Any, *, rules: Any = (), block_size: int = 1
) -> SNState:
    """Makes a state from what `flax.linen.SpectralNorm` keeps in `batch_stats`.

    The parameters are used as they are. For a model decorated with `jsn.linen.spectral_norm`
    whose parameters have the same paths, the collection is `{"spectral_norm": state}`.

    Flax normalizes by one power step more than its state says: `jsn.normalize` with
    `n_steps=1` gives what its layers compute next.

    Args:
        params: The parameters, `variables["params"]`.
        batch_stats: The collection, `variables["batch_stats"]`. Statistics of other layers are
            ignored.
        rules: Pairs of a path pattern and an operator or None, which come before Flax's own
            view. `("bias$", None)` lets go of attention biases, which Flax normalizes too.
        block_size: With 1, Flax's `u` is continued. With more, the state is made anew.

    Returns:
        The state of these parameters.

    Raises:
        TypeError: If `batch_stats` is no mapping, or a weight is not real floating point.
        ValueError: If a `u` has no parameter, or a parameter of another shape; or if there is
            none at all.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jsn
        >>> class Critic(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.SpectralNorm(nn.Dense(4))(x, update_stats=True)
        >>> variables = Critic().init(jax.random.key(0), jnp.ones((2, 3)))
        >>> state = jsn.interop.from_flax_linen(variables["params"], variables["batch_stats"])
        >>> state.u["Dense_0"]["kernel"].shape
        (1, 4)

    References:
        flax/linen/normalization.py of Flax 0.12.8.
    """
    call = "jsn.interop.from_flax_linen"
    expect_mapping(call, "the collection variables['batch_stats']", batch_stats)
    where = match(call, _LINEN, params, batch_stats)
    return take_over(call, params, found(_LINEN, batch_stats, where), rules, block_size)


def to_flax_linen(params: PyTree, state: Any, batch_stats: Any) -> Any:
    """Writes a state into the `batch_stats` of a model with `flax.linen.SpectralNorm`.

    Flax always normalizes to 1: where you use another `bound`, or `soft`, or a `scale`, leave
    with `jsn.fold` and a model without SpectralNorm.

    Args:
        params: The parameters, which both models share.
        state: Their state.
        batch_stats: The collection of the Flax model, from its `init`, as a template.

    Returns:
        The collection with every `u` and `sigma` replaced, and all else as it was.

    Raises:
        TypeError: If `state` is no state or `batch_stats` no mapping.
        ValueError: If state and template do not normalize the same weights, or Flax cannot
            express an operator; naming every such weight.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jsn
        >>> class Critic(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.SpectralNorm(nn.Dense(4))(x, update_stats=True)
        >>> variables = Critic().init(jax.random.key(0), jnp.ones((2, 3)))
        >>> params, template = variables["params"], variables["batch_stats"]
        >>> stats = jsn.interop.to_flax_linen(params, jsn.init(params), template)
        >>> stats["SpectralNorm_0"]["Dense_0/kernel/u"].shape
        (1, 4)

    References:
        flax/linen/normalization.py of Flax 0.12.8.
    """
    call = "jsn.interop.to_flax_linen"
    expect_mapping(call, "the collection variables['batch_stats']", batch_stats)
    where = match(call, _LINEN, params, batch_stats)
    return write(call, _LINEN, params, state, batch_stats, where)


def from_flax_nnx(model: Any, *, rules: Any = (), block_size: int = 1) -> tuple[PyTree, SNState]:
    """Takes the weights and their state out of an nnx model with `nnx.SpectralNorm` in it.

    Note that nnx.SpectralNorm overwrites its weights with normalized ones on every call, so
    these, and not the raw ones, are what a model that has been used contains.

    Args:
        model: The model, or its `nnx.state(model)`.
        rules: Pairs of a path pattern and an operator or None, which come before Flax's own
            view of a weight. Patterns are matched with the paths of the result.
        block_size: With 1, Flax's `u` is continued. With more, the state is made anew.

    Returns:
        The `Param`s as an `nnx.State` with the paths of the model without wrappers
        (`nnx.update(plain_model, params)`), and their state.

    Raises:
        TypeError: If `model` is neither, or a weight is not real floating point.
        ValueError: If a `u` has no parameter, or one of another shape; or if there is none.

    Examples:
        ```python
        import jsn
        from flax import nnx

        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs))
        params, state = jsn.interop.from_flax_nnx(model)
        plain = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs))
        nnx.update(plain, params)
        ```

    References:
        flax/nnx/nn/normalization.py of Flax 0.12.8. Flax has it since 0.12.1.
    """
    call = "jsn.interop.from_flax_nnx"
    wrapped, variables = _variables(call, model)
    stats = _nested(variables)
    where = match(call, _NNX, _nested(wrapped), stats)
    wrappers = _wrappers(where)
    params = _nested({_unwrapped(path, wrappers): x for path, x in wrapped.items()})
    known = {
        "/".join(_unwrapped(tuple(path.split("/")), wrappers)): x
        for path, x in found(_NNX, stats, where).items()
    }
    return params, take_over(call, params, known, rules, block_size)


def to_flax_nnx(params: PyTree, state: Any, model: Any) -> PyTree:
    """Writes weights and their state for an nnx model with `nnx.SpectralNorm` in it.

    Flax always normalizes to 1: where you use another `bound`, or `soft`, or a `scale`, leave
    with `jsn.fold` and a model without SpectralNorm.

    Args:
        params: Parameters with the paths of the model without wrappers.
        state: Their state.
        model: The wrapped model, or its `nnx.state(model)`, as a template. It is not changed.

    Returns:
        What `nnx.update(model, ...)` takes: the model's `Param`s and `BatchStat`s, with the
        weights, `u` and `sigma` replaced.

    Raises:
        TypeError: If `state` is no state, or `model` no model.
        ValueError: If state and template do not normalize the same weights, if parameters are
            missing, or if Flax cannot express an operator; naming every such weight.

    Examples:
        ```python
        import jsn
        from flax import nnx

        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs))
        params, state = jsn.interop.from_flax_nnx(model)
        nnx.update(model, jsn.interop.to_flax_nnx(params, state, model))
        ```

    References:
        flax/nnx/nn/normalization.py of Flax 0.12.8. Flax has it since 0.12.1.
    """
    call = "jsn.interop.to_flax_nnx"
    wrapped, variables = _variables(call, model)
    stats = _nested(variables)
    where = match(call, _NNX, _nested(wrapped), stats)
    wrappers = _wrappers(where)
    plain = {
        key: "/".join(_unwrapped(tuple(path.split("/")), wrappers)) for key, path in where.items()
    }
    written = write(call, _NNX, params, state, stats, plain)
    given = {leaf.path: leaf.value for leaf in flatten(params)[0] if leaf.value is not None}
    shapes = {path: np.shape(x) for path, x in given.items()}
    paths = {path: "/".join(map(str, _unwrapped(path, wrappers))) for path in wrapped}
    problems = [
        (paths[path], f"expected shape {x.shape}, found {shapes.get(paths[path], 'nothing')}")
        for path, x in wrapped.items()
        if shapes.get(paths[path]) != x.shape
    ]
    if problems:
        raise ValueError(_errors.bad_entries(call, problems, _FIX))
    news = {path: x.replace(given[paths[path]]) for path, x in wrapped.items()}
    return nnx.merge_state(_nested(news), written)


# --- where Flax puts things ---------------------------------------------------------------------


def _linen_candidates(key: Parts, params: Sequence[Parts]) -> Iterator[Sequence[Parts]]:
    """In the wrapper's own scope, in one around it, or anywhere under the same names."""
    yield [key]
    for index in reversed(range(len(key) - 1)):
        yield [key[:index] + key[index + 1 :]]
    for index in range(1, len(key) - 1):
        tail = key[index:]
        yield [path for path in params if path[-len(tail) :] == tail]


def _nnx_candidates(key: Parts, params: Sequence[Parts]) -> Iterator[Sequence[Parts]]:
    """In the layer that the wrapper holds."""
    del params
    for index in (i for i, name in enumerate(key) if name == "batch_stats"):
        yield [(*key[:index], "layer_instance", *key[index + 1 :])]


_FIX = (
    "Expected parameters (..., n) for each u of shape (1, n). Hand over the parameters and the "
    "statistics of one and the same model."
)
_LINEN = Layout("flax.linen.SpectralNorm", "u", _linen_candidates, _FIX)
_NNX = Layout("flax.nnx.SpectralNorm", "u", _nnx_candidates, _FIX)

_Variables = Mapping[tuple, nnx.Variable]


def _variables(call: str, model: Any) -> tuple[_Variables, _Variables]:
    """The parameters and the statistics of a model, by their keys.

    Raises:
        TypeError: If it is no nnx module and no state of one.
    """
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    if not isinstance(state, nnx.State):
        what = "an nnx.Module, or the nnx.state of one"
        raise TypeError(_errors.not_importable(call, what, type(model).__name__))
    entries = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_box)[0]
    found = {tuple(getattr(k, "key", k) for k in path): x for path, x in entries}
    params = {path: x for path, x in found.items() if isinstance(x, nnx.Param)}
    return params, {path: x for path, x in found.items() if isinstance(x, nnx.BatchStat)}


def _nested(variables: Mapping[tuple, nnx.Variable]) -> PyTree:
    """A state of new variables: those of nnx.state are the model's own."""
    tree: dict[Any, Any] = {}
    for (*scope, name), variable in variables.items():
        functools.reduce(lambda node, key: node.setdefault(key, {}), scope, tree)[name] = (
            jax.tree.map(lambda x: x, variable)
        )
    return nnx.State(tree)


def _unwrapped(path: tuple, wrappers: Collection[Parts]) -> tuple:
    """A path in the model without wrappers."""
    names = tuple(map(str, path))
    return tuple(
        key
        for index, key in enumerate(path)
        if not (names[index] == "layer_instance" and names[:index] in wrappers)
    )


def _wrappers(where: Mapping[Parts, str]) -> set[Parts]:
    """The paths of the SpectralNorm modules themselves."""
    return {key[: key.index("batch_stats")] for key in where}
