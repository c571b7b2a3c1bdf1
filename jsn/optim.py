"""Station 7, the optax adapter: constraints and penalties on the norm, as gradient transformations.

In: an update and the parameters it is for. Out: the update that lands where the norms are as asked,
or that moves them there. Weights that no rule matches, and the forward pass, are left alone. Must
not know how norms are found or limited: stations 1 to 6 do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jsn import _errors, _normalize
from jsn._caps import LARGEST_DROP, clip, soft_clip
from jsn._constrain import per_leaf
from jsn._operator import Matrix
from jsn._power import check_count
from jsn._rules import FLAX, Leaf, Rules, assign
from jsn._types import PyTree, SNState

_SETTLED, _MOST = 1e-4, 16
"""Sigma has settled when a power step makes it grow by less than this, or after so many steps."""

Value = Any
"""A number, a scalar array, a tree prefix of the parameters of those, or a schedule of one."""


class TrackedState(NamedTuple):
    """The state of a transformation that tracks norms: how many updates, and the blocks."""

    count: Int[Array, ""]
    sn_state: SNState


class CountState(NamedTuple):
    """The state of a transformation that only counts updates, for schedules."""

    count: Int[Array, ""]


def keep_spectral_norm_below(
    bound: Value,
    *,
    rules: Rules = FLAX,
    block_size: int = 32,
    warmup: int = 15,
    n_steps: int = 1,
) -> optax.GradientTransformation:
    """Scales weights back after the update, wherever their norm exceeds the bound.

    Each weight becomes `W * min(1, bound / sigma)`, with sigma tracked from update to update: the
    true norm stays below `bound` to about 1e-3, in float32. Put it last in a chain. In contrast to
    `jsn.normalize` the forward pass is the plain one, and the weights themselves are constrained.

    In calm training that is one power step, four reads of each weight. Where an update is as
    large as the weight, as Adam's first ones may be, sigma still grows, and more steps follow
    until it does not.

    Args:
        bound: A number above 0 (traced or not), a tree prefix of the parameters of those, or a
            schedule: a function of the number of updates so far.
        rules: See `jsn.init`.
        block_size: See `jsn.init`.
        warmup: See `jsn.init`.
        n_steps: Power steps after which sigma is compared; 0 takes the blocks as they are.

    Returns:
        A transformation that needs `params`. Updates of weights that stay below the bound, and of
        leaves that no rule matches, pass unchanged. A NaN makes its own weight NaN, and spoils
        neither the state nor other weights.

    Raises:
        ValueError: If a bound known at trace time is not above 0; on `init`, what `jsn.init`
            raises; on `update`, if there are no `params`.

    Examples:
        >>> import jax.numpy as jnp, jsn, optax
        >>> params = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
        >>> tx = optax.chain(optax.sgd(1.0), jsn.optim.keep_spectral_norm_below(2.0))
        >>> updates, state = tx.update({"kernel": -4 * jnp.eye(3), "bias": jnp.ones(3)},
        ...                            tx.init(params), params)
        >>> print(optax.apply_updates(params, updates)["kernel"][0].round(5))
        [2. 0. 0.]

    References:
        Gouk et al. 2018, Regularisation of Neural Networks by Enforcing Lipschitz Continuity,
        algorithm 2, https://arxiv.org/abs/1804.04368
    """
    call = "jsn.optim.keep_spectral_norm_below"
    _check(call, bound, n_steps)

    def update(updates: PyTree, state: TrackedState, params: PyTree = None):
        moved = _moved(call, updates, params)
        sn_state = _settled(call, moved, state.sn_state, n_steps)
        landed, _ = _normalize.normalize(
            moved, sn_state, n_steps=0, bound=_at(bound, state.count), soft=True
        )
        return _landing(updates, params, moved, landed), _next(state, sn_state)

    return _transformation(_tracker(rules, block_size, warmup), update)


def add_spectral_decay(
    weight: Value,
    *,
    rules: Rules = FLAX,
    block_size: int = 32,
    warmup: int = 50,
    n_steps: int = 1,
) -> optax.GradientTransformation:
    """Adds the gradient of the penalty `weight / 2 * sum of sigma^2` to the updates.

    The penalty is on the largest stretch of each weight, where weight decay, which adds the
    gradient of the sum of all squared singular values, reaches it indirectly. Put it where
    `optax.add_decayed_weights` would stand: before the learning rate.

    Args:
        weight: A number (traced or not), or a schedule.
        rules: See `jsn.init`.
        block_size: See `jsn.init`.
        warmup: See `jsn.init`; the gradient needs the singular vectors, which settle later than
            the singular value does.
        n_steps: Power steps for each update.

    Returns:
        A transformation that needs `params`. Of a zero weight the gradient is zero.

    Raises:
        ValueError: On `init`, what `jsn.init` raises; on `update`, if there are no `params`.

    Examples:
        >>> import jax.numpy as jnp, jsn, optax
        >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
        >>> tx = optax.chain(jsn.optim.add_spectral_decay(0.1), optax.sgd(1.0))
        >>> updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
        >>> print(f"{updates['kernel'][0, 0]:.4f}")
        -0.3000

    References:
        Yoshida and Miyato 2017, Spectral Norm Regularization for Improving the Generalizability
        of Deep Learning, equation 3, https://arxiv.org/abs/1705.10941
    """
    call = "jsn.optim.add_spectral_decay"
    check_count(call, "n_steps", n_steps, 0)

    def update(updates: PyTree, state: TrackedState, params: PyTree = None):
        _check_params(call, params)

        def penalty(params: PyTree):
            sigmas, sn_state = _normalize.track(params, state.sn_state, n_steps, call)
            return sum(jnp.sum(sigma**2) for sigma in jax.tree.leaves(sigmas)) / 2, sn_state

        grads, sn_state = jax.grad(penalty, has_aux=True, allow_int=True)(params)
        factor = _at(weight, state.count)
        add = lambda u, g: u if _is_inert(u, g) else (u + factor * g).astype(u.dtype)
        return jax.tree.map(add, updates, grads, is_leaf=_is_none), _next(state, sn_state)

    return _transformation(_tracker(rules, block_size, warmup), update)


def soft_cap(
    bound: Value,
    *,
    max_update: Value,
    weight_decay: Value = 0.0,
    rules: Rules = FLAX,
    block_size: int = 32,
    warmup: int = 15,
    n_steps: int = 1,
) -> optax.GradientTransformation:
    """Presses all singular values below the bound after the update, the larger the harder.

    The odd polynomials `x - a x^3` and `x + a x^3`, one after the other, with the `a` that takes
    the largest possible singular value after an update, `bound * (1 - weight_decay) + max_update`,
    to `bound`. A weight that is larger nevertheless (at the start, say) is scaled down first.

    Args:
        bound: See `keep_spectral_norm_below`.
        max_update: The largest norm of a single update: the learning rate, for an orthogonalized
            update such as Muon's. A number or a schedule.
        weight_decay: The fraction by which the optimizer shrinks weights in each update: learning
            rate times weight decay. A number or a schedule.
        rules: See `jsn.init`; the views must be `jsn.Matrix`.
        block_size: See `jsn.init`.
        warmup: See `jsn.init`.
        n_steps: See `keep_spectral_norm_below`.

    Returns:
        A transformation that needs `params`.

    Raises:
        ValueError: If the polynomials are no cap for these numbers, which is so where
            `max_update` is more than about 0.3 of the bound; otherwise as
            `keep_spectral_norm_below`. With schedules and traced values, such weights are
            scaled down first, as far as it takes.

    Examples:
        >>> import jax.numpy as jnp, jsn, optax
        >>> params = {"kernel": jnp.diag(jnp.array([1.0, 0.5]))}
        >>> tx = optax.chain(optax.sgd(0.1), jsn.optim.soft_cap(1.0, max_update=0.1))
        >>> updates, state = tx.update({"kernel": -jnp.eye(2)}, tx.init(params), params)
        >>> print([f"{s:.3f}" for s in jnp.diag(optax.apply_updates(params, updates)["kernel"])])
        ['1.000', '0.594']

    References:
        Newhouse et al. 2025, Training Transformers with Enforced Lipschitz Constants,
        spectral soft cap and its coupling, https://arxiv.org/abs/2507.13338
    """
    call = "jsn.optim.soft_cap"
    _check(call, bound, n_steps)
    _check_coupling(call, bound, max_update, weight_decay)

    def update(updates: PyTree, state: TrackedState, params: PyTree = None):
        moved = _moved(call, updates, params)
        caps, grow, shrink = (_at(x, state.count) for x in (bound, max_update, weight_decay))
        reach = jax.tree.map(lambda c: _reach(c, grow, shrink), caps)
        sn_state = _settled(call, moved, state.sn_state, n_steps)
        scaled, _ = _normalize.normalize(moved, sn_state, n_steps=0, bound=reach, soft=True)
        cap = lambda operator, W, c: soft_clip(operator, W, c, _reach(c, grow, shrink))
        landed = _limited(call, scaled, rules, caps, cap)
        return _landing(updates, params, moved, landed), _next(state, sn_state)

    make = _tracker(rules, block_size, warmup)
    return _transformation(_matrices_only(call, rules, make), update)


def hard_cap(bound: Value, *, rules: Rules = FLAX) -> optax.GradientTransformation:
    """Projects weights onto the ball of norm `bound` after the update: `min(s, bound)`.

    That is what becomes of each singular value.
    The projection changes the weight as little as can be, where `keep_spectral_norm_below` shrinks
    all of it. It takes a full eigendecomposition of the Gram matrix of the smaller side for each
    update, and no state; in float32, singular values are exact to about `1e-6 * (sigma / bound)^2`.

    Args:
        bound: See `keep_spectral_norm_below`.
        rules: See `jsn.init`; the views must be `jsn.Matrix`.

    Returns:
        A transformation that needs `params`.

    Raises:
        ValueError: As `keep_spectral_norm_below`, and on `init` where a view is no `jsn.Matrix`.

    Examples:
        >>> import jax.numpy as jnp, jsn, optax
        >>> params = {"kernel": jnp.diag(jnp.array([1.0, 0.5]))}
        >>> tx = optax.chain(optax.sgd(1.0), jsn.optim.hard_cap(2.0))
        >>> updates, state = tx.update({"kernel": -3 * jnp.eye(2)}, tx.init(params), params)
        >>> print(jnp.diag(optax.apply_updates(params, updates)["kernel"]).round(3))
        [2. 2.]
    """
    call = "jsn.optim.hard_cap"
    _check(call, bound)

    def update(updates: PyTree, state: CountState, params: PyTree = None):
        moved = _moved(call, updates, params)
        landed = _limited(call, moved, rules, _at(bound, state.count), clip)
        return _landing(updates, params, moved, landed), _next(state)

    make = lambda params: CountState(jnp.zeros((), jnp.int32))
    return _transformation(_matrices_only(call, rules, make), update)


# --- the state --------------------------------------------------------------------------------


def _transformation(init: Any, update: Any) -> optax.GradientTransformation:
    return optax.GradientTransformation(init, update)


def _tracker(rules: Rules, block_size: int, warmup: int) -> Callable[[PyTree], TrackedState]:
    def make(params: PyTree) -> TrackedState:
        sn_state = _normalize.init(params, rules=rules, block_size=block_size, warmup=warmup)
        return TrackedState(jnp.zeros((), jnp.int32), sn_state)

    return make


def _matrices_only(call: str, rules: Rules, make: Callable) -> Callable:
    """An `init` that refuses views which are no matrices: their powers are no such views."""

    def checked(params: PyTree):
        leaves = [leaf for leaf in assign(params, rules, call)[0] if leaf.operator is not None]
        wrong = [
            (x.path, f"rule {x.operator}") for x in leaves if not isinstance(x.operator, Matrix)
        ]
        if wrong:
            raise ValueError(_errors.cap_needs_matrix(call, wrong))
        return make(params)

    return checked


def _next(state: Any, *rest: SNState) -> Any:
    """The state with one more update counted, and the next blocks."""
    return type(state)(optax.safe_increment(state.count), *rest)


def _at(value: Value, count: Int[Array, ""]) -> Any:
    """The value of a schedule at a step, or the value itself."""
    return value(count) if callable(value) else value


def _settled(call: str, params: PyTree, sn_state: SNState, n_steps: int) -> SNState:
    """The state after `n_steps` power steps, and after more of them while sigma still grows.

    An update may be as large as the weight (the first ones of Adam are), and then the block from
    before is a poor guess. Sigma never exceeds the truth, so that it has stopped growing is the
    sign that it has got there.
    """
    if n_steps == 0:
        return sn_state
    params = jax.lax.stop_gradient(params)

    def step(carry: Any) -> Any:
        sn_state, before, _, count = carry
        now, sn_state = _normalize.track(params, sn_state, n_steps, call)
        grown = [
            jnp.any(new > (1 + _SETTLED) * old)
            for new, old in zip(*map(jax.tree.leaves, (now, before)), strict=True)
        ]
        return sn_state, now, jnp.any(jnp.stack(grown)), count + 1

    before, _ = _normalize.track(params, sn_state, 0, call)
    carry = sn_state, before, jnp.bool_(True), jnp.int32(0)
    return jax.lax.while_loop(lambda carry: carry[2] & (carry[3] < _MOST), step, carry)[0]


# --- updates, and where they land -------------------------------------------------------------


def _is_none(x: Any) -> bool:
    return x is None


def _is_inert(u: Any, g: Any) -> bool:
    """Whether there is no update, or a leaf that has no gradient (an integer)."""
    return u is None or g is None or g.dtype == jax.dtypes.float0


def _check_params(call: str, params: PyTree) -> None:
    if params is None:
        raise ValueError(_errors.no_params(call))


def _moved(call: str, updates: PyTree, params: PyTree) -> PyTree:
    """The parameters after the update, in at least float32."""
    _check_params(call, params)

    def move(p: Any, u: Any) -> Any:
        if p is None or u is None:
            return p
        dtype = np.result_type(p.dtype, u.dtype, np.float32)
        return p.astype(dtype) + u.astype(dtype)

    return jax.tree.map(move, params, updates, is_leaf=_is_none)


def _landing(updates: PyTree, params: PyTree, moved: PyTree, landed: PyTree) -> PyTree:
    """The updates that lead from the parameters to `landed`; unchanged where that is `moved`."""

    def update(u: Any, p: Any, m: Any, x: Any) -> Any:
        if u is None or p is None or m is x:
            return u
        return jnp.where(x == m, u, x - p).astype(np.promote_types(u.dtype, p.dtype))

    return jax.tree.map(update, updates, params, moved, landed, is_leaf=_is_none)


def _limited(call: str, params: PyTree, rules: Rules, bound: Any, limit: Callable) -> PyTree:
    """Applies a limit to the singular values of each weight."""
    leaves, rebuild = assign(params, rules, call)
    bounds = per_leaf(call, "bound", bound, params, leaves)
    return rebuild(
        [
            leaf.value if leaf.operator is None else limit(leaf.operator, leaf.value, c)
            for leaf, c in zip(leaves, bounds, strict=True)
        ]
    )


def _reach(bound: Any, max_update: Any, weight_decay: Any) -> Array:
    """The largest norm after an update, as far as the soft cap can take it to the bound."""
    after = bound * (1 - weight_decay) + max_update
    return jnp.clip(after, bound, bound / (1 - LARGEST_DROP))


# --- what can be checked at once --------------------------------------------------------------


def _check(call: str, bound: Value, n_steps: int = 1) -> None:
    """Raises where a bound known now is none; its place in the tree is checked with the weights."""
    check_count(call, "n_steps", n_steps, 0)
    weight = np.zeros((1, 1), np.float32)
    for x in [] if callable(bound) else jax.tree.leaves(bound):
        if np.ndim(x) == 0:
            per_leaf(call, "bound", x, weight, [Leaf("", weight, Matrix())])


def _check_coupling(call: str, bound: Value, max_update: Value, weight_decay: Value) -> None:
    """Raises where the soft cap would be none, as far as the numbers are known now."""
    if any(callable(x) or isinstance(x, jax.Array) for x in (max_update, weight_decay)):
        return
    for c in [] if callable(bound) else jax.tree.leaves(bound):
        after = c * (1 - weight_decay) + max_update
        if not isinstance(c, jax.Array) and not after * (1 - LARGEST_DROP) <= c:
            largest = c / (1 - LARGEST_DROP) - c * (1 - weight_decay)
            raise ValueError(_errors.no_cap(call, c, max_update, largest))
