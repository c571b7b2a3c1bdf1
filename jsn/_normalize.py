"""Station 6. A tree of parameters in, the same tree normalized out: init, normalize, sigmas, fold.

In: parameters, rules, and the state from before. Out: normalized parameters, sigmas, and the
next state. Must not know any framework: a tree is a tree, a path is a path.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization, traverse_util

from jsn import _errors, _plan
from jsn._constrain import constrain, per_leaf
from jsn._power import check_count
from jsn._rules import FLAX, Leaf, Rules, assign, check_dtypes, flatten
from jsn._sharding import check_explicit
from jsn._types import Block, Operator, PyTree, Sigma, SNState, Weight


def init(params: PyTree, *, rules: Rules = FLAX, block_size: int = 32, warmup: int = 15) -> SNState:
    """Makes the state of spectral normalization for a tree of parameters.

    Deterministic: it needs no PRNG key. The state is warmed up, so that sigma is true to about
    1e-3 from the first step on. The parameters are read, not changed.

    A weight that is zero, or not finite, at this time gets a valid state that finds its sigma
    once it is usable.

    Args:
        params: Any pytree of arrays; metadata boxes (`nn.Partitioned`) are opened.
        rules: Pairs of a path pattern and an operator or None; paths are keys joined by "/",
            patterns match with `re.search`, the first match wins. Leaves that no rule matches
            are left alone.
        block_size: Vectors tracked for each weight, at most the smaller side of the weight.
            More are truer where many directions compete, see `docs/which.md`.
        warmup: Power steps before the state is handed out.

    Returns:
        The state, to be carried beside the parameters.

    Raises:
        TypeError: If a matched leaf is no array, or integer, boolean or complex.
        ValueError: If a rule is malformed, matches nothing or does not fit its leaves, if no
            leaf is matched, or if `block_size < 1` or `warmup < 0`.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"dense": {"kernel": 4 * jnp.eye(3), "bias": jnp.ones(3)}}
        >>> state = jsn.init(params)
        >>> state.u["dense"]["kernel"].shape, state.u["dense"]["bias"]
        ((3, 3), None)
    """
    call = "jsn.init"
    block_size = check_count(call, "block_size", block_size, 1)
    warmup = check_count(call, "warmup", warmup, 0)
    leaves, rebuild = assign(params, rules, call)
    tracked = [leaf for leaf in leaves if leaf.operator is not None]
    check_explicit(tracked, call)
    operators = tuple(leaf.operator for leaf in tracked)
    us = _plan.begin(operators, [leaf.value for leaf in tracked], block_size, warmup)  # type: ignore
    by_path = dict(zip((leaf.path for leaf in tracked), us, strict=True))
    u = rebuild([by_path.get(leaf.path) for leaf in leaves], boxed=False)
    return SNState(u, tuple((leaf.path, leaf.operator) for leaf in tracked))  # type: ignore


def normalize(
    params: PyTree,
    state: SNState | Mapping[str, Any],
    *,
    n_steps: int = 1,
    bound: Any = 1.0,
    soft: bool = False,
    scale: Any = None,
) -> tuple[PyTree, Any]:
    """Divides every tracked weight by its largest singular value, and advances the state.

    Pure: `params` is not changed, and everything that is not tracked is handed through. Call it
    once per training step, inside the function that is differentiated: gradients flow through
    sigma, the next state carries none. Then use the result as often as the step needs.

    A zero weight stays zero. A NaN in one weight makes that weight NaN, leaves its state as it
    was, and touches no other weight. The arithmetic is at least float32, the result has the
    dtype of the weight.

    Args:
        params: The raw parameters.
        state: The state that `init` made for them, or a linen collection
            `variables["sn_state"]`.
        n_steps: Power steps; 0 uses the state as it is, with a single read of each weight.
        bound: The norm that each weight is given: a number above 0 (traced or not), or a tree
            prefix of `params` of such numbers.
        soft: Scale by `min(1, bound / sigma)`: weights below the bound are left alone.
        scale: A factor on top, for example a learned one; a scalar or a tree prefix.

    Returns:
        The normalized parameters, and a state of identical structure, shapes and dtypes.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If the state does not fit the parameters, `n_steps < 0`, or a bound that is
            known at trace time is not a number above 0; naming every offending leaf.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"dense": {"kernel": 4 * jnp.eye(3), "bias": jnp.ones(3)}}
        >>> normalized, state = jsn.normalize(params, jsn.init(params))
        >>> print(normalized["dense"]["kernel"][0].round(5))
        [1. 0. 0.]

    References:
        Hard: Miyato et al. 2018, https://arxiv.org/abs/1802.05957, equation 8.
        Soft: Gouk et al. 2018, https://arxiv.org/abs/1804.04368, section 3.3.
        Scale: Zhai et al. 2023, https://arxiv.org/abs/2303.06296, sigmaReparam.
    """
    return _normalize("jsn.normalize", params, state, n_steps, bound, soft, scale)[:2]


class Factored(NamedTuple):
    """A tracked leaf, and how it was normalized."""

    raw: Weight
    normalized: Weight
    factor: Sigma
    """What it was multiplied with, `(*batch)`."""


def factored(
    params: PyTree, state: Any, n_steps: int, **options: Any
) -> tuple[PyTree, Any, list[Factored]]:
    """What `normalize` returns, and all that is tracked, leaf by leaf."""
    call = "jsn.normalize"
    return _normalize(call, params, state, n_steps, **options, with_factors=True)


def _normalize(
    call: str,
    params: PyTree,
    state: Any,
    n_steps: int,
    bound: Any,
    soft: bool,
    scale: Any,
    with_factors: bool = False,
) -> tuple[PyTree, Any, list[Factored]]:
    n_steps = check_count(call, "n_steps", n_steps, 0)
    leaves, rebuild, us, replace = _match(params, state, call)
    bounds = per_leaf(call, "bound", bound, params, leaves)
    scales = per_leaf(call, "scale", scale, params, leaves)
    tracked = [index for index, leaf in enumerate(leaves) if leaf.operator is not None]
    pick = lambda values: [values[index] for index in tracked]
    values, found = [leaf.value for leaf in leaves], []
    if tracked:
        laid = _lay(pick(leaves), us)
        sigmas, blocks = _plan.track(laid.operators, laid.weights, laid.us, n_steps)
        bounds, scales = laid.together(pick(bounds)), laid.together(pick(scales))
        scaled, factors = constrain(laid.operators, laid.weights, sigmas, bounds, soft, scales)
        wanted = [scaled, blocks, *[factors] * with_factors]
        for index, value, u, *factor in zip(tracked, *laid.apart(*wanted), strict=True):
            found += [Factored(values[index], value, *factor)] if factor else []
            values[index], us[leaves[index].path] = value, u
    return rebuild(values), replace(us), found


def sigmas(params: PyTree, state: SNState | Mapping[str, Any], *, n_steps: int = 0) -> PyTree:
    """The estimated largest singular value of every tracked weight.

    Args:
        params: The raw parameters.
        state: Their state, or a linen collection of it.
        n_steps: Power steps before reading; 0 reads each weight once.

    Returns:
        A tree like `params`, with a sigma of shape `(*batch)` for each tracked weight and None
        elsewhere. Zero weights give 0, weights that are not finite give NaN.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If the state does not fit the parameters, or `n_steps < 0`.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0])), "bias": jnp.ones(2)}
        >>> tree = jsn.sigmas(params, jsn.init(params))
        >>> print(tree["kernel"].round(4), tree["bias"])
        3.0 None
    """
    return track(params, state, n_steps, "jsn.sigmas")[0]


def track(
    params: PyTree, state: SNState | Mapping[str, Any], n_steps: int, call: str
) -> tuple[PyTree, Any]:
    """What `sigmas` returns, and the next state.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If the state does not fit the parameters, or `n_steps < 0`.
    """
    n_steps = check_count(call, "n_steps", n_steps, 0)
    leaves, rebuild, us, replace = _match(params, state, call)
    found, us = _track(leaves, us, n_steps)
    return rebuild([found.get(leaf.path) for leaf in leaves], boxed=False), replace(us)


def fold(
    params: PyTree,
    state: SNState | Mapping[str, Any],
    *,
    n_steps: int = 15,
    bound: Any = 1.0,
    soft: bool = False,
    scale: Any = None,
) -> PyTree:
    """Normalizes once and for all, for inference or export: afterwards jsn can be forgotten.

    Takes and raises what `normalize` does; the extra steps make sigma as true as it gets.

    Returns:
        Plain parameters, of the structure, dtypes and metadata boxes of `params`.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"kernel": 4 * jnp.eye(3)}
        >>> print(jsn.fold(params, jsn.init(params), bound=2.0)["kernel"][0].round(5))
        [2. 0. 0.]
    """
    return _normalize("jsn.fold", params, state, n_steps, bound, soft, scale)[0]


# --- parameters and state, leaf by leaf ------------------------------------------------------


def _track(
    leaves: Sequence[Leaf], us: Mapping[str, Block], n_steps: int
) -> tuple[dict[str, Any], dict[str, Block]]:
    """Sigmas and next blocks of the tracked leaves, by path."""
    tracked = [leaf for leaf in leaves if leaf.operator is not None]
    if not tracked:
        return {}, {}
    laid = _lay(tracked, us)
    found = _plan.track(laid.operators, laid.weights, laid.us, n_steps)
    paths = [leaf.path for leaf in tracked]
    sigmas, blocks = (dict(zip(paths, each, strict=True)) for each in laid.apart(*found))
    return sigmas, blocks


def _lay(leaves: Sequence[Leaf], us: Mapping[str, Block]) -> _plan.Laid:
    operators: Any = [leaf.operator for leaf in leaves]
    return _plan.lay(operators, [leaf.value for leaf in leaves], [us[leaf.path] for leaf in leaves])


Replace = Callable[[Mapping[str, Block]], Any]


def _match(
    params: PyTree, state: Any, call: str
) -> tuple[list[Leaf], Callable, dict[str, Block], Replace]:
    """Brings parameters and state together: leaves with operators, and blocks by path.

    Also returns how to rebuild the parameters, and how to rebuild the state around new blocks.

    Raises:
        TypeError: If `state` is no state, or a tracked leaf is not real floating point.
        ValueError: If the state was made for other paths or shapes.
    """
    parts = _parts(state, call)
    bare, rebuild = flatten(params)
    values = {leaf.path: leaf.value for leaf in bare}
    problems = [problem for prefix, part in parts for problem in _strangers(prefix, part, values)]
    if problems:
        raise ValueError(_errors.other_model(call, problems))
    us = {prefix + x.path: x.value for prefix, part in parts for x in flatten(part.u)[0]}
    views = {prefix + path: view for prefix, part in parts for path, view in part.operators}
    leaves = [dataclasses.replace(leaf, operator=views.get(leaf.path)) for leaf in bare]
    check_dtypes([leaf for leaf in leaves if leaf.operator is not None], call)
    for index, leaf in enumerate(leaves):
        if leaf.operator is not None:
            operator, what = _fit(leaf, us[leaf.path])
            leaves[index] = dataclasses.replace(leaf, operator=operator)
            problems += [(leaf.path, what)] if operator is None else []
    if problems:
        raise ValueError(_errors.other_model(call, problems))
    check_explicit(leaves, call)

    def replace(new: Mapping[str, Block]) -> Any:
        prefixes = iter([prefix for prefix, _ in parts])

        def renew(part: SNState) -> SNState:
            prefix = next(prefixes)
            old, rebuild_u = flatten(part.u)
            return dataclasses.replace(part, u=rebuild_u([new.get(prefix + x.path) for x in old]))

        return jax.tree.map(renew, state, is_leaf=lambda node: isinstance(node, SNState))

    return leaves, rebuild, us, replace


def _parts(state: Any, call: str) -> list[tuple[str, SNState]]:
    """The SNStates within a state, each with the path of the parameters it belongs to."""
    if isinstance(state, SNState):
        return [("", state)]
    is_state = lambda node: isinstance(node, SNState)
    entries = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_state)[0]
    if not isinstance(state, Mapping) or not entries or not all(is_state(x) for _, x in entries):
        raise TypeError(_errors.not_a_state(call, _describe(state)))
    # A linen variable lies one key below the scope, and so the parameters, it belongs to.
    return [("".join(f"{key.key}/" for key in keys[:-1]), part) for keys, part in entries]


def _describe(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a {type(state).__name__} with the keys {list(state)[:8]}"
    return type(state).__name__


def _strangers(prefix: str, part: SNState, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Leaves that only the state, or only the parameters, know."""
    known = {prefix + leaf.path for leaf in flatten(part.u)[0]}
    found = {path for path in values if path.startswith(prefix)}
    return [(path, "in the state, not in the parameters") for path in sorted(known - found)] + [
        (path, "in the parameters, not in the state") for path in sorted(found - known)
    ]


def _fit(leaf: Leaf, u: Any) -> tuple[Operator | None, str]:
    """The operator that fits both a weight and its block, or None and what is wrong.

    Inside nn.scan or nn.vmap a state is made for one layer; outside, both have gained leading
    axes, and so must the operator.
    """
    shape, found = np.shape(leaf.value), np.shape(u)
    view: Operator = leaf.operator  # type: ignore
    for n_lifted in range(max(1, len(shape) - 1)):
        for axes in itertools.combinations(range(len(shape)), n_lifted):
            inner = tuple(n for axis, n in enumerate(shape) if axis not in axes)
            if view.problem(inner) is not None:
                continue
            operator = view.lifted(axes, len(shape))
            batch, codomain = operator.batch(shape), operator.codomain(shape)
            if found == (*batch, *found[len(batch) : len(batch) + 1], *codomain):
                return operator, ""
    return None, f"shape {shape}, view {leaf.operator}, does not go with a block of shape {found}"


# --- serialization ----------------------------------------------------------------------------


def _to_state_dict(state: SNState) -> dict[str, Any]:
    us = {leaf.path: leaf.value for leaf in flatten(state.u)[0]}
    tracked = {tuple(path.split("/")): us[path] for path, _ in state.operators}
    return {"u": traverse_util.unflatten_dict(tracked)}


def _from_state_dict(target: SNState, restored: Mapping[str, Any]) -> SNState:
    leaves, rebuild = flatten(target.u)
    found = {"/".join(k): v for k, v in traverse_util.flatten_dict(restored.get("u", {})).items()}
    expected = {leaf.path: leaf.value for leaf in leaves if leaf.value is not None}
    problems = [
        (path, f"found {_shape(found.get(path))}, expected {_shape(expected.get(path))}")
        for path in sorted({*found, *expected})
        if _shape(found.get(path)) != _shape(expected.get(path))
    ]
    if problems:
        raise ValueError(_errors.bad_restore(problems))
    return dataclasses.replace(target, u=rebuild([found.get(leaf.path) for leaf in leaves]))


def _shape(block: Any) -> str:
    return "nothing" if block is None else f"shape {np.shape(block)}"


serialization.register_serialization_state(SNState, _to_state_dict, _from_state_dict)
