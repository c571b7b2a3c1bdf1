"""Station 10. An audit: one row for each weight of a tree, or of a file.

In: parameters and rules, or the entries of a checkpoint. Out: an `Audit`, whose rows say how
large each weight is, with a proven bound. Must not know file formats or how a table is drawn.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsn import _normalize, _report, _rules
from jsn._errors import Problem
from jsn._files import Checkpoint, Entry, Unreadable
from jsn._measure import NOT_FINITE, Row, measure, scan
from jsn._rounding import float_up
from jsn._rules import FLAX, TORCH, Leaf, Rules, assign
from jsn._types import Operator, PyTree


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A leaf that is not audited.

    Attributes:
        path: Keys joined by "/".
        shape: Its shape.
        dtype: The name of its dtype.
        bytes: Its size.
        note: Why it is left alone, where it is not because no rule matches it.
        warnings: That it is not finite.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    note: str = ""
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Audit:
    """The weights of a model, one row each, in the order of their names.

    It shows itself in notebooks, in `rich` and by `print`.

    Attributes:
        rows: A `Row` for each weight.
        left_alone: The leaves that no rule makes a weight.
        source: The file it came from, if any.
    """

    rows: tuple[Row, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    source: str = ""

    @property
    def product(self) -> float:
        """The product of all bounds, rounded up; NaN where one is missing or not finite.

        It bounds the l2 Lipschitz constant of a plain chain of these maps, as they are viewed,
        with activations that stretch nothing. A convolution counts only where its view is
        `jsn.Conv`. For anything but such a chain there is `jsn.lipschitz_bound`.
        """
        bounds = [np.nan if row.bound is None else row.bound for row in self.rows]
        factors = np.concatenate([np.ravel(bound) for bound in bounds]) if bounds else np.ones(0)
        if np.isnan(factors).any() or (np.isinf(factors).any() and (factors == 0).any()):
            return math.nan
        if np.isinf(factors).any():
            return math.inf
        return float_up(math.prod(map(Fraction, factors.tolist()), start=Fraction(1)))

    def table(self) -> str:
        """The audit as text in aligned columns; bounds are rounded up."""
        return _report.text(self)

    def plot(self, path: Any) -> None:
        """Draws norms along depth and the spectra of the layers with the largest norms.

        Args:
            path: A file that matplotlib can write, such as "audit.png".

        Raises:
            ImportError: If matplotlib is not installed.
        """
        _report.plot(self, path)

    def to_json(self, path: Any) -> None:
        """Writes the audit as JSON: `{"rows": [{"path", "shape", "sigma", "bound", ...}], ...}`.

        A number that is not finite is written as null, and a warning in its row says so. The
        file is written whole or not at all.
        """
        text = json.dumps(_report.as_dict(self), indent=1, allow_nan=False)
        _report.write(path, f"{text}\n".encode())

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> Any:
        return _report.rich_table(self)

    def _repr_html_(self) -> str:
        return _report.html(self)


def audit(params: PyTree, *, rules: Rules = FLAX, state: Any = None) -> Audit:
    """Measures every weight of a tree of parameters: norm, proven bound, rank, condition.

    Runs on concrete arrays, on the host. A zero weight is reported as dead, one that is not
    finite has NaN in its row; both carry a warning, neither raises.

    Args:
        params: Any pytree of arrays.
        rules: Which leaves are weights, and as which operators, as in `jsn.init`.
        state: The state of `jsn.init` or a linen collection `variables["sn_state"]`. Its weights
            and views are audited, whatever the rules, and each row tells the norm after
            normalization by the state as it is.

    Returns:
        An Audit with `.rows`, `.left_alone`, `.product`, `.table()`, `.plot(path)` and
        `.to_json(path)`.

    Raises:
        TypeError: If a matched leaf is no array, or integer, boolean or complex, or `state` is
            no state.
        ValueError: If a rule is malformed, matches nothing or does not fit its leaves, if no
            leaf is matched, or if the state does not fit the parameters.

    Examples:
        >>> import jax.numpy as jnp, jsn
        >>> params = {"Dense_0": {"kernel": 3 * jnp.eye(4), "bias": jnp.zeros(4)}}
        >>> audit = jsn.audit(params)
        >>> row = audit.rows[0]
        >>> row.path, row.view, round(row.sigma, 6), row.bound >= 3, round(row.stable_rank, 6)
        ('Dense_0/kernel', '4 -> 4', 3.0, True, 4.0)
        >>> [leaf.path for leaf in audit.left_alone]
        ['Dense_0/bias']
    """
    call, tracked = "jsn.audit", {}
    if state is None:
        leaves, _ = assign(params, rules, call)
    else:
        leaves, _, us, _ = _normalize._match(params, state, call)
        tracked, _ = _normalize._track(leaves, us, 0)
    leaves = sorted((leaf for leaf in leaves if leaf.value is not None), key=_by_name)
    rows = [
        measure(leaf.path, leaf.value, leaf.operator, tracked.get(leaf.path))
        for leaf in leaves
        if leaf.operator is not None
    ]
    rest = [_left_alone(leaf.path, leaf.value) for leaf in leaves if leaf.operator is None]
    return Audit(tuple(rows), tuple(rest))


def _by_name(leaf: Leaf) -> list:
    """Sorts layer_2 before layer_10."""
    parts = re.split(r"0*([0-9]+)", leaf.path)
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)]


def _left_alone(path: str, value: Any, note: str = "") -> LeftAlone:
    if jnp.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended):  # keys of jax.random  # type: ignore
        return LeftAlone(path, value.shape, str(value.dtype), value.nbytes, note)
    x = np.asarray(value)
    warnings = ()
    if jnp.issubdtype(x.dtype, jnp.floating) and (not_finite := scan(x)[0]):
        warnings = (f"{NOT_FINITE}: {not_finite} of {x.size} entries are NaN or infinite",)
    return LeftAlone(path, x.shape, x.dtype.name, x.nbytes, note, warnings)


# --- files ------------------------------------------------------------------------------------

OUTSIDE = "outside params"


def audit_entries(
    checkpoint: Checkpoint,
    rules: Rules = (),
    *,
    source: str = "",
    progress: Callable[[Entry], None] = lambda entry: None,
) -> tuple[Audit, list[Problem]]:
    """Audits a checkpoint, one array at a time.

    Args:
        checkpoint: The entries.
        rules: The caller's own; after them come FLAX and TORCH.
        source: What to call the checkpoint.
        progress: Called with each entry after it was read.

    Returns:
        The audit of what can be read, and what is wrong with the rest: arrays that cannot be
        read or hold a NaN, weights that are not finite, rules that do not fit.

    Raises:
        TypeError: If rules are no sequence.
        ValueError: If rules are malformed.
    """
    compiled = _rules._check((*rules, *FLAX, *TORCH), "jsn audit")
    own = compiled[: len(rules)]
    rows, rest, problems = [], [], [*checkpoint.problems]
    leaves = sorted((Leaf(_path(entry.name), entry) for entry in checkpoint.entries), key=_by_name)
    within = any(_keys(entry.name)[0] == "params" for entry in checkpoint.entries)
    for pattern, _ in own:
        if not any(pattern.search(leaf.path) for leaf in leaves):
            problems.append(("", f"--rules: {pattern.pattern!r} matches no name"))
    for leaf in leaves:
        entry: Entry = leaf.value
        asked = any(pattern.search(leaf.path) for pattern, _ in own)
        operator, note = _operator(leaf.path, entry, compiled)
        if within and _keys(entry.name)[0] != "params":
            operator, note = None, OUTSIDE
        elif note and asked:
            problems.append((leaf.path, note))
        try:
            value = entry.read()
            if operator is not None:
                rows.append(measure(leaf.path, value, operator))
                problems += [(leaf.path, x) for x in rows[-1].warnings if x.startswith(NOT_FINITE)]
            else:
                rest.append(_left_alone(leaf.path, value, note))
                if rest[-1].warnings and np.isnan(value).any():
                    problems.append((leaf.path, rest[-1].warnings[0]))
        except Unreadable as error:
            problems.append((leaf.path, str(error)))
        except MemoryError:
            problems.append((leaf.path, f"needs more memory than there is: {entry.nbytes} bytes"))
        progress(entry)
    return Audit(tuple(rows), tuple(rest), source), problems


def _keys(name: str) -> list[str]:
    return re.split(r"[/.]", name)


def _path(name: str) -> str:
    """The path of an entry: as if it came from the tree of parameters itself."""
    keys = _keys(name)
    keys = keys[1:] if keys[0] == "params" and len(keys) > 1 else keys
    keys = keys[:-1] if keys[-1] == "value" and len(keys) > 1 else keys  # the boxes of nnx, linen
    return "/".join(keys)


def _operator(path: str, entry: Entry, compiled: Sequence) -> tuple[Operator | None, str]:
    """The operator of an entry, or None and why a rule that matches it cannot be followed."""
    leaf = Leaf(path, jax.ShapeDtypeStruct(entry.shape, entry.dtype))
    operator = _rules._first_match(leaf, compiled)
    if operator is None:
        return None, ""
    if not jnp.issubdtype(entry.dtype, jnp.floating):
        return None, f"dtype {entry.dtype.name} is no real floating point"
    what = operator.problem(entry.shape)
    return (operator, "") if what is None else (None, f"shape {entry.shape}, {operator}: {what}")
