"""Station 10, one weight: everything an audit says about it.

In: a weight and its operator. Out: a `Row`. The weight is read in slices, on the host, so that
little more memory is needed than it takes itself. Must not know trees, files or tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsn._bounds import upper_bound
from jsn._normalize import init
from jsn._operator import Matrix, size
from jsn._power import power_iterate
from jsn._rounding import scaled
from jsn._types import Operator

LARGEST_SVD = 1024
"""Smaller side up to which all singular values are computed."""
EXPLODING = 1e3
"""A norm above this is called exploding."""
NOT_FINITE = "not finite"
"""What the warning about a NaN or an infinity begins with."""
_SLICE = 2**20
"""Entries that are converted to float64 at once."""

Numbers = float | np.ndarray
"""One number, or one for each batch entry of the operator, in an array of shape `(*batch)`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What an audit says about one weight.

    Weights that are not finite have NaN for all numbers.

    Attributes:
        path: Keys joined by "/".
        shape: The shape of the weight.
        dtype: The name of its dtype.
        view: The linear map that the weight stands for, such as "288 -> 64".
        sigma: The largest singular value: from an SVD in float64 where the smaller side is at
            most 1024, else an estimate from power iteration, never above it up to rounding.
        bound: A proven upper bound of it, from `jsn.upper_bound`; None where there is none.
        frobenius: The Frobenius norm of the entries.
        stable_rank: (frobenius / sigma)^2; None where the operator is no matrix.
        condition: Largest over smallest singular value, infinite where the smallest is 0 to
            rounding; None where it was not computed.
        normalized: The norm after normalization by the state, sigma over tracked sigma; None
            without a state.
        bytes: Size of the weight.
        warnings: What should not be: dead, exploding, not finite.
        notes: What was not computed, and why.
        spectrum: All singular values, of the batch entry with the largest one, or None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    view: str
    sigma: Numbers
    bound: Numbers | None
    frobenius: Numbers
    stable_rank: Numbers | None
    condition: Numbers | None
    normalized: Numbers | None
    bytes: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    spectrum: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)


def measure(path: str, weight: Any, operator: Operator, tracked: Any = None) -> Row:
    """Measures one weight.

    Args:
        path: Its path.
        weight: Any array of real floats whose shape fits the operator.
        operator: How it is seen.
        tracked: The sigma by which a state divides it, if there is one.
    """
    W = np.asarray(weight)
    known: dict[str, Any] = {
        "path": path,
        "shape": W.shape,
        "dtype": W.dtype.name,
        "view": describe(operator, W.shape),
        "bytes": W.nbytes,
    }
    batch = operator.batch(W.shape)
    not_finite, largest = scan(W)
    if not_finite:
        nan: Any = _plain(np.full(batch, np.nan))
        what = f"{NOT_FINITE}: {not_finite} of {W.size} entries are NaN or infinite"
        return Row(
            **known,
            **{"sigma": nan, "bound": nan, "frobenius": nan, "stable_rank": nan, "condition": nan},
            normalized=None if tracked is None else nan,
            warnings=(what,),
            notes=(),
        )
    return Row(**known, **_numbers(W, operator, batch, math.frexp(largest)[1], tracked))


def _numbers(
    W: np.ndarray, operator: Operator, batch: tuple[int, ...], exponent: int, tracked: Any
) -> dict[str, Any]:
    warnings, notes = [], []
    bound = None
    try:
        bound = np.asarray(upper_bound(W, operator=operator), np.float64)
    except (TypeError, ValueError, FloatingPointError, MemoryError) as error:
        detail = (str(error) or type(error).__name__).splitlines()[0]
        notes.append(f"no bound: {detail}")
    frobenius = _frobenius(W, operator, batch, exponent)
    condition = spectrum = stable_rank = None
    if isinstance(operator, Matrix):
        sigma, condition, spectrum = _singular(W, operator, exponent, bound)
        dead = _dead(W, operator)
        if condition is None:
            notes.append(f"condition not computed: the smaller side is above {LARGEST_SVD}")
        elif np.isinf(condition).any():
            notes.append("condition infinite: singular to rounding")
        if W.ndim - len(batch) > 3:
            notes.append("seen as a matrix: a convolution can have a larger norm, see jsn.Conv")
        safe = np.where(sigma > 0, sigma, 1)
        stable_rank = np.where(sigma > 0, (frobenius / safe) ** 2, 0.0)
    else:
        sigma = np.ldexp(_estimate(W, operator, exponent, bound), exponent)
        dead = "all entries are 0" if not W.any() else ""
        notes.append("condition and stable rank not computed: no matrix")
    if bound is not None:
        sigma = np.minimum(sigma, bound)  # the last rounding of an SVD
    if dead:
        warnings.append(f"dead: {dead}")
    if (sigma > EXPLODING).any():
        warnings.append(f"exploding: sigma is above {EXPLODING:g}")
    normalized = None
    if tracked is not None:
        tracked = np.asarray(tracked, np.float64)
        normalized = np.where(tracked > 0, sigma / np.where(tracked > 0, tracked, 1), 0.0)
    return {
        "sigma": _plain(sigma),
        "bound": _plain(bound),
        "frobenius": _plain(frobenius),
        "stable_rank": _plain(stable_rank),
        "condition": _plain(condition),
        "normalized": _plain(normalized),
        "warnings": tuple(warnings),
        "notes": tuple(notes),
        "spectrum": spectrum,
    }


def _plain(x: Any) -> Any:
    """A number where there is only one."""
    return x if x is None or np.ndim(x) else float(x)


def describe(operator: Operator, shape: tuple[int, ...]) -> str:
    """An operator by the sizes of its sides."""
    domain, codomain = operator.domain(shape), operator.codomain(shape)
    if isinstance(operator, Matrix):
        sides = f"{size(domain)} -> {size(codomain)}"
    else:
        joined = ("x".join(map(str, side)) for side in (domain, codomain))
        sides = f"{type(operator).__name__.lower()} {' -> '.join(joined)}"
    batch = operator.batch(shape)
    return f"{'x'.join(map(str, batch))} of {sides}" if batch else sides


# --- reading in slices ------------------------------------------------------------------------


def scan(x: np.ndarray) -> tuple[int, float]:
    """How many entries are not finite, and the largest magnitude of the others."""
    not_finite, largest = 0, 0.0
    for part in _parts(x):
        with np.errstate(invalid="ignore"):  # a signalling NaN warns when it is cast
            part = np.abs(part.astype(np.float64))
        finite = np.isfinite(part)
        not_finite += part.size - int(np.count_nonzero(finite))
        largest = max(largest, float(part.max(where=finite, initial=0.0)))
    return not_finite, largest


def _parts(x: np.ndarray) -> Iterator[np.ndarray]:
    if x.size <= _SLICE:
        yield x
        return
    rows = max(1, _SLICE * len(x) // x.size)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        if part.size > 2 * _SLICE:
            yield from _parts(part[0])
        else:
            yield part


def _frobenius(
    W: np.ndarray, operator: Operator, batch: tuple[int, ...], exponent: int
) -> np.ndarray:
    """Frobenius norms, one for each batch entry."""
    spread = operator.spread(jnp.zeros(batch), W.shape).shape  # 1 where an axis is no batch axis
    axes = [axis for axis, n in enumerate(spread) if n > 1]
    x = np.moveaxis(W, axes, range(len(axes)))
    sums = np.zeros(x.shape[: len(axes)])
    for entry in np.ndindex(sums.shape):
        parts = _parts(x[entry])
        sums[entry] = math.fsum(float(np.square(scaled(part, exponent)).sum()) for part in parts)
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.ldexp(np.sqrt(sums), exponent)).reshape(batch)


def _matrices(W: np.ndarray, operator: Matrix) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The matrices `(in, out)` of a weight, one by one: views where the layout allows."""
    ins, outs, batch = operator._axes(W.ndim)
    x = W.transpose(*batch, *ins, *outs)
    n_in = size([W.shape[axis] for axis in ins])
    for entry in np.ndindex(x.shape[: len(batch)]):
        yield entry, x[entry].reshape(n_in, -1)


def _dead(W: np.ndarray, operator: Matrix) -> str:
    """Which inputs and outputs are cut off, over all batch entries."""
    dead_in = dead_out = n_in = n_out = 0
    for _, M in _matrices(W, operator):
        alive = np.zeros(M.shape[1], bool)
        for rows in _rows(M, 1):
            nonzero = rows != 0
            alive |= nonzero.any(axis=0)
            dead_in += len(rows) - int(nonzero.any(axis=1).sum())
        dead_out += len(alive) - int(alive.sum())
        n_in, n_out = n_in + M.shape[0], n_out + M.shape[1]
    if dead_in == n_in:
        return "all entries are 0"
    counts = [(dead_out, n_out, "outputs"), (dead_in, n_in, "inputs")]
    found = [f"{dead} of {n} {side}" for dead, n, side in counts if dead]
    return f"{' and '.join(found)} have only zeros" if found else ""


def _rows(M: np.ndarray, at_least: int) -> Iterator[np.ndarray]:
    rows = max(at_least, _SLICE // M.shape[1])
    for start in range(0, len(M), rows):
        yield M[start : start + rows]


# --- singular values --------------------------------------------------------------------------


def _singular(
    W: np.ndarray, operator: Matrix, exponent: int, bound: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Norm and condition of each batch entry, and all singular values of the largest."""
    batch = operator.batch(W.shape)
    sigma, condition = np.zeros(batch), np.zeros(batch)
    if min(size(operator.domain(W.shape)), size(operator.codomain(W.shape))) > LARGEST_SVD:
        for entry, M in _matrices(W, operator):
            known = None if bound is None else bound[entry]
            sigma[entry] = _estimate(M, Matrix(), exponent, known)
        return np.asarray(np.ldexp(sigma, exponent)), None, None
    spectrum = np.zeros(0)
    with np.errstate(over="ignore", under="ignore"):
        for entry, M in _matrices(W, operator):
            values = singular_values(M, exponent)
            noise = np.finfo(np.float64).eps * max(M.shape) * values[0]
            sigma[entry] = np.ldexp(values[0], exponent)
            condition[entry] = values[0] / values[-1] if values[-1] > noise else np.inf
            if not spectrum.size or sigma[entry] > spectrum[0]:
                spectrum = np.ldexp(values, exponent)
    return sigma, condition, spectrum


def singular_values(M: np.ndarray, exponent: int) -> np.ndarray:
    """Singular values of `2**-exponent * M` in float64, in descending order.

    A tall matrix is reduced to its triangular factor slice by slice (TSQR), which is as accurate
    as factorizing it whole.

    References:
        Demmel et al. 2012, Communication-optimal parallel and sequential QR and LU
        factorizations, https://arxiv.org/abs/0808.2664.
    """
    if M.shape[0] < M.shape[1]:
        M = M.T
    R = np.zeros((0, M.shape[1]))
    for rows in _rows(M, 4 * M.shape[1]):
        R = np.linalg.qr(np.concatenate([R, scaled(rows, exponent)]), mode="r")
    return np.linalg.svd(R, compute_uv=False)


_iterate = jax.jit(power_iterate, static_argnames=("n_steps", "operator"))


def _estimate(W: np.ndarray, operator: Operator, exponent: int, bound: Any) -> np.ndarray:
    """Norm of `2**-exponent * W` by power iteration, until it meets the bound or settles."""
    exact = W.dtype == np.float64
    if exact:  # to float32, whose range may be too small for it
        W = np.stack([scaled(rows, exponent).astype(np.float32) for rows in W])
    x = jnp.asarray(W, jnp.float32 if W.dtype.itemsize == 1 else None)
    u = init({"w": x}, rules=(("w", operator),)).u["w"]
    goal = np.inf if bound is None else np.ldexp(bound, -exponent) * (1 - 1e-6)
    old = sigma = np.zeros(())
    for _ in range(20):  # pragma: no branch - a limit, and no weight is known that meets it
        found, u = _iterate(x, u, n_steps=10, operator=operator)
        sigma = np.asarray(found, np.float64)
        sigma = sigma if exact else np.asarray(np.ldexp(sigma, -exponent))
        if (sigma >= goal).all() or (np.abs(sigma - old) <= 1e-7 * sigma).all():
            break
        old = sigma
    return sigma
