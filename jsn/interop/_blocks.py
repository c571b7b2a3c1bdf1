"""Station 11, the part all libraries share: their vectors into a state, and out of it.

In: parameters, and for some of their paths the vector that another library tracked. Out: an
`SNState`; and from a state, one singular triple for each weight. Must not know any library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jsn import _errors
from jsn._normalize import _match, init
from jsn._operator import Matrix
from jsn._power import check_count
from jsn._rules import Leaf, assign, flatten
from jsn._types import Operator, PyTree, SNState


class Found(NamedTuple):
    """What another library knows of a weight: its view, and `u` as a block of one vector."""

    operator: Matrix
    u: np.ndarray


def take_over(
    call: str, params: PyTree, found: Mapping[str, Found], rules: Any, block_size: Any
) -> SNState:
    """A state that goes on from the vectors found.

    A block is made anew where more than one vector is asked for, where a rule sees the weight in
    a way that `u` does not fit, and where `u` is lost: zero, or not finite.

    Raises:
        TypeError: If a weight is not real floating point, or `rules` are no sequence.
        ValueError: If a view does not fit its weight, a rule is malformed or matches nothing, or
            `block_size < 1`.
    """
    block_size = check_count(call, "block_size", block_size, 1)
    exact = [(f"^{re.escape(path)}$", known.operator) for path, known in found.items()]
    is_sequence = isinstance(rules, Sequence) and not isinstance(rules, str)
    rules = (*rules, *exact) if is_sequence else rules  # assign tells what is wrong with it
    leaves, rebuild = assign(params, rules, call)
    tracked = [leaf for leaf in leaves if leaf.operator is not None]
    blocks = {leaf.path: _block(leaf, found.get(leaf.path), block_size) for leaf in tracked}
    if any(block is None for block in blocks.values()):
        fresh = flatten(init(params, rules=rules, block_size=block_size).u)[0]
        blocks |= {leaf.path: leaf.value for leaf in fresh if blocks.get(leaf.path) is None}
    u = rebuild([blocks.get(leaf.path) for leaf in leaves], boxed=False)
    return SNState(u, tuple((leaf.path, leaf.operator) for leaf in tracked))  # type: ignore


def _block(leaf: Leaf, known: Found | None, block_size: int) -> Any:
    """The block found for a leaf, or None if it is not to be had."""
    shape: tuple[int, ...] = np.shape(leaf.value)
    batch, codomain = leaf.operator.batch(shape), leaf.operator.codomain(shape)  # type: ignore
    if known is None or block_size > 1 or known.u.shape != (*batch, 1, *codomain):
        return None
    u = known.u.astype(np.float64)
    norm = np.sqrt(np.sum(u * u, axis=-1, keepdims=True))
    if not (np.isfinite(norm) & (norm > 0)).all():
        return None
    # Flax starts from a random vector that is not normalized; anything else stays bit for bit.
    return jnp.array(np.where(abs(norm - 1) > 0.1, u / norm, u), jnp.float32)


class Triple(NamedTuple):
    """The best singular triple that a state knows of a weight, in numpy."""

    operator: Operator
    weight: Any
    sigma: np.ndarray
    u: np.ndarray
    v: np.ndarray


def triples(call: str, params: PyTree, state: Any) -> tuple[list[Leaf], dict[str, Triple]]:
    """The leaves of the parameters, and a triple for each that is tracked, by path.

    Raises:
        TypeError: If `state` is no state.
        ValueError: If it does not fit the parameters.
    """
    leaves, _, us, _ = _match(params, state, call)
    tracked = [leaf for leaf in leaves if leaf.operator is not None]
    return leaves, {leaf.path: _triple(leaf, us[leaf.path]) for leaf in tracked}


def _triple(leaf: Leaf, block: Any) -> Triple:
    """Rayleigh-Ritz on a stored block; a block of one vector comes back bit for bit."""
    operator: Operator = leaf.operator  # type: ignore
    batch = operator.batch(np.shape(leaf.value))
    n_batch = len(batch)
    W = jnp.asarray(leaf.value)
    W = W.astype(jnp.float32) if W.dtype.itemsize < 4 else W  # float8 does not promote by itself
    u = np.asarray(block)
    v = np.asarray(operator.rmatvec(W, jnp.asarray(block)), np.float64)
    sides = u.shape[n_batch + 1 :], v.shape[n_batch + 1 :]
    rows = [x.reshape(*batch, u.shape[n_batch], -1) for x in (u, v)]
    if u.shape[n_batch] > 1:
        gram = rows[1] @ np.swapaxes(rows[1], -1, -2)
        finite = np.isfinite(gram).all(axis=(-2, -1), keepdims=True)
        best = np.linalg.eigh(np.where(finite, gram, np.eye(u.shape[n_batch])))[1][..., -1]
        rows = [best[..., None, :] @ x for x in rows]
    norms = [np.linalg.norm(x, axis=-1, keepdims=True) for x in rows]
    u, v = (x.reshape(*batch, *side) for x, side in zip(rows, sides, strict=True))
    u_norm, v_norm = (np.where(norm > 0, norm, 1) for norm in norms)
    sigma = (norms[1] / u_norm).reshape(batch)
    v = v / v_norm.reshape(*batch, *[1] * len(sides[1]))
    return Triple(operator, leaf.value, sigma, u, v)


def expect_mapping(call: str, what: str, value: Any) -> None:
    """Checks the kind of an argument.

    Raises:
        TypeError: If it is no mapping.
    """
    if not isinstance(value, Mapping):
        raise TypeError(_errors.not_importable(call, what, type(value).__name__))
