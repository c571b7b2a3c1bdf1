"""What a compiled program sends between devices, read off its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

_KINDS = (
    "all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|"
    "collective-broadcast|send|recv"
)
_COLLECTIVE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?:-start)?\((?P<rest>.*)")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+)(?:e\w+)?\[(?P<shape>[\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\(\[(?P<dims>[\d,]+)\]"
    r"(?:T\((?P<order>[\d,]+)\))?\))? \{(?P<over>[^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices: its kind, the arrays it makes, and the groups that take part.

    The shapes are those on one device.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each array."""
        return [_bytes(dtype) * math.prod(shape) for dtype, shape in self.arrays]

    def axes(self, mesh: Mesh) -> frozenset[str]:
        """The mesh axes along which it goes."""
        places = {device.id: place for place, device in np.ndenumerate(mesh.devices)}
        found = set()
        for group in self.groups or (tuple(places),):
            for column, name in zip(zip(*map(places.get, group), strict=True), mesh.axis_names):  # type: ignore # noqa: B905
                found |= {name} if len(set(column)) > 1 else set()
        return frozenset(found)


def _bytes(dtype: str) -> int:
    return 1 if dtype == "pred" else -(-int(re.sub(r"\D", "", dtype)) // 8)


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    if listed := _LISTED.search(text):
        return tuple(tuple(_integers(g)) for g in re.findall(r"\{([\d,]*)\}", listed[1]))
    if iota := _IOTA.search(text):
        return _rows(_ids(iota[2], iota[3]), _integers(iota[1]))
    if mesh := _MESH.search(text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh["axes"]))
        over = re.findall(r"'(\w+)'", mesh["over"])
        if ":" in mesh["over"]:
            raise ValueError(f"part of a mesh axis: {mesh[0]}")
        ids = _ids(mesh["dims"] or ",".join(sizes.values()), mesh["order"])
        ids = ids.reshape([int(n) for n in sizes.values()])
        ids = np.moveaxis(ids, [list(sizes).index(name) for name in over], range(-len(over), 0))
        return _rows(ids, (-1, math.prod(int(sizes[name]) for name in over)))
    if "replica_groups={}" in text or "replica_groups" not in text:
        return ()
    raise ValueError(f"unknown groups: {text}")


def _ids(dims: str, order: str | None) -> np.ndarray:
    """The devices `[dims]T(order)` of an iota list."""
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return ids.transpose(_integers(order)) if order else ids


def _rows(ids: np.ndarray, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, ids.reshape(shape).tolist()))


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program; those of a loop's body count once."""
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            arrays = tuple(
                (array["dtype"], tuple(_integers(array["shape"])))
                for array in _ARRAY.finditer(match["result"])
            )
            found.append(Collective(match["kind"], arrays, _groups(match["rest"])))
    return found
