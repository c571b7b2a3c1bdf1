"""Station 11, the part all libraries share: their vectors into a state, and out of it.

In: parameters, and for some of their paths the vector that another library tracked. Out: an
`SNState`; and from a state, one singular triple for each weight. Must not know any library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsn import _errors
from jsn._normalize import _match, init
from jsn._operator import Matrix
from jsn._power import Pair, check_count, stored_pair, usable
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
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        rules = (*rules, *exact)
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
    """The best singular triple that a state knows of a weight, on the host."""

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
    operators: tuple[Any, ...] = tuple(leaf.operator for leaf in tracked)
    weights = [leaf.value for leaf in tracked]

    @jax.jit  # as a whole: the small operations would each be compiled alone
    def read(weights: Any, blocks: Any) -> list[Pair]:
        known = zip(operators, weights, blocks, strict=True)
        return [stored_pair(operator, W, usable(u)) for operator, W, u in known]

    pairs = jax.device_get(read(weights, [us[leaf.path] for leaf in tracked]))
    made = {}
    for leaf, pair in zip(tracked, pairs, strict=True):
        n_batch = len(leaf.operator.batch(np.shape(leaf.value)))  # type: ignore
        u = np.asarray(us[leaf.path])
        single = u.shape[n_batch] == 1  # then it comes back bit for bit
        u = u.squeeze(n_batch) if single else pair.u
        made[leaf.path] = Triple(leaf.operator, leaf.value, pair.sigma, u, pair.v)  # type: ignore
    return leaves, made


def one_sided(template: Iterable[str], state: Iterable[str]) -> list[tuple[str, str]]:
    """The weights, by path, that only the template or only the state normalizes."""
    both = set(template) & set(state)
    return [
        (path, f"normalized by the {one}, not by the {other}")
        for paths, one, other in ((template, "template", "state"), (state, "state", "template"))
        for path in paths
        if path not in both
    ]


def expect_mapping(call: str, what: str, value: Any) -> None:
    """Checks the kind of an argument.

    Raises:
        TypeError: If it is no mapping.
    """
    if not isinstance(value, Mapping):
        raise TypeError(_errors.not_importable(call, what, type(value).__name__))

