"""Shared types: what an operator must offer, and the state carried beside the parameters.

In: nothing. Out: `Operator`, `SNState`, array aliases. Must not know how anything is computed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Array, Float, Num

PyTree: TypeAlias = Any
Weight: TypeAlias = Num[Array, "..."]
"""A raw weight leaf, of any rank; it is read, never written."""
Block: TypeAlias = Float[Array, "..."]
"""A block of vectors, `(*batch, block, *codomain)` for `u`, `(*batch, block, *domain)` for `v`."""
Sigma: TypeAlias = Float[Array, "*batch"]
"""Estimated largest singular values, one for each batch entry of the operator."""


@runtime_checkable
class Operator(Protocol):
    """A weight seen as a linear map from its domain (input side) to its codomain (output side).

    An operator is static: hashable, comparable, free of arrays. It is told the weight on each
    call. Blocks of vectors keep their batch axes first, then the block axis, then the axes of
    the side they live on.
    """

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Says why a weight of this shape cannot be viewed this way, or None if it can."""
        ...

    def batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the batch axes: one operator, and one sigma, for each entry."""
        ...

    def domain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the input side."""
        ...

    def codomain(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the output side."""
        ...

    def matvec(self, W: Weight, v: Block) -> Block:
        """Applies the map to a block `(*batch, block, *domain)` of the input side."""
        ...

    def rmatvec(self, W: Weight, u: Block) -> Block:
        """Applies the transpose of the map to a block `(*batch, block, *codomain)`."""
        ...

    def spread(self, values: Sigma, shape: tuple[int, ...]) -> Array:
        """Reshapes one value for each batch entry so that it broadcasts against the weight."""
        ...

    def lifted(self, axes: tuple[int, ...], ndim: int) -> Operator:
        """The operator of a weight of rank `ndim` that has gained these batch axes."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SNState:
    """The tracked blocks of a whole tree of weights: the state of spectral normalization.

    It is a pytree: it jits, vmaps, scans, donates, shards and checkpoints like parameters.

    Attributes:
        u: A tree shaped like the parameters it was made for, with a float32 block
            `(*batch, block, *codomain)` for each tracked weight, and None elsewhere.
        operators: The operator of each tracked leaf, by path. Static.
    """

    u: PyTree
    operators: tuple[tuple[str, Operator], ...] = dataclasses.field(metadata={"static": True})
