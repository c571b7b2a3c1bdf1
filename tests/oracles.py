"""What bounds are measured against: exact arithmetic, mpmath, float64 SVDs, dense convolutions.

None of it uses jsn's own arithmetic. `assert_certified` and `matrices.assert_converged` never
meet: a bound that is close and a bound that holds are different claims.
"""

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import ml_dtypes
import mpmath
import numpy as np
from jax import lax


def assert_certified(bound, norm, margin: float = 1e-13) -> None:
    """A bound is at or above the norm; `margin` is what the oracle itself may be off by."""
    bound, norm = np.asarray(bound, np.float64), np.asarray(norm, np.float64)
    assert np.all(bound >= norm * (1 - margin)), f"bound {bound} < norm {norm}: {bound / norm - 1}"


# --- matrices ------------------------------------------------------------------------------------


def peak_exponent(W: np.ndarray) -> int:
    """The exponent of the power of two just above all entries."""
    return int(np.frexp(np.abs(np.asarray(W, np.float64)).max())[1])


def scaled_norm(W: np.ndarray) -> tuple[float, int]:
    """The largest singular value as `value * 2**exponent`, by a float64 SVD of scaled entries."""
    W = np.asarray(W, np.float64)
    if not W.any():
        return 0.0, 0
    exponent = peak_exponent(W)
    return float(np.linalg.svd(np.ldexp(W, -exponent), compute_uv=False)[0]), exponent


def certifies(bound: float, W: np.ndarray, margin: float = 1e-13) -> bool:
    """Whether a bound is at or above the SVD's norm, at any scale."""
    value, exponent = scaled_norm(W)
    return (
        math.isinf(bound)
        or Fraction(bound) >= Fraction(value * (1 - margin)) * Fraction(2) ** exponent
    )


def exactly_bounds(c: float | Fraction, W: np.ndarray) -> bool:
    """Whether c >= |W|, in exact rational arithmetic: c^2 I - W^T W has an L D L^T with D >= 0."""
    W = np.asarray(W, np.float64)
    W = W if W.shape[0] >= W.shape[1] else W.T
    rows = [[Fraction(float(x)) for x in row] for row in W]
    n = W.shape[1]
    A = [[-sum(row[i] * row[j] for row in rows) for j in range(n)] for i in range(n)]
    for i in range(n):
        A[i][i] += Fraction(c) ** 2
    for k in range(n):
        if A[k][k] < 0 or (A[k][k] == 0 and any(A[i][k] for i in range(k + 1, n))):
            return False
        for i in range(k + 1, n):
            factor = A[i][k] / A[k][k] if A[k][k] else Fraction(0)
            for j in range(k + 1, n):
                A[i][j] -= factor * A[k][j]
    return True


def mpmath_norm(W: np.ndarray, digits: int = 60) -> mpmath.mpf:
    """The largest singular value to many digits."""
    with mpmath.workdps(digits):
        return mpmath.svd_r(mpmath.matrix(np.asarray(W, np.float64).tolist()), compute_uv=False)[0]


DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


# Each kind is hard in one way or another: a function of a generator, a Gaussian and its shape.
KINDS = {
    "gaussian": lambda rng, x, m, n: x,
    "positive": lambda rng, x, m, n: np.abs(x),  # no cancellation: rounding at its worst
    "rank_one": lambda rng, x, m, n: 1.0 * np.outer(rng.integers(-8, 9, m), rng.integers(-8, 9, n)),
    "tied": lambda rng, x, m, n: np.linalg.qr(rng.standard_normal((max(m, n), min(m, n))))[0],
    "nearly_tied": lambda rng, x, m, n: np.eye(m, n) + 1e-12 * x,
    "graded": lambda rng, x, m, n: np.ldexp(
        x, rng.integers(-500, 1, (m, 1)) + rng.integers(-500, 1, (1, n))
    ),
    "parallel": lambda rng, x, m, n: 1 + np.ldexp(1.0 * rng.integers(-1, 2, (m, n)), -52),
    "hilbert": lambda rng, x, m, n: 1 / (1.0 + np.arange(m)[:, None] + np.arange(n)),
    "sparse": lambda rng, x, m, n: x**9 * (rng.random((m, n)) < 0.1),
    "signs": lambda rng, x, m, n: np.sign(x),
    "toeplitz": lambda rng, x, m, n: rng.standard_normal(m + n)[
        np.arange(m)[:, None] - np.arange(n) + n - 1
    ],
    "dropped": lambda rng, x, m, n: np.where(
        rng.random((m, n)) < 0.5, 1.0, np.ldexp(1.0, -450)
    ) * x,
}  # fmt: skip


def hard_matrix(seed: int) -> np.ndarray:
    """The seed-th of the matrices that bounds are tried on: any kind, dtype, shape and scale."""
    rng = np.random.default_rng(seed)
    kind = list(KINDS.values())[seed % len(KINDS)]
    m, n = (int(2 ** rng.uniform(0, 5.5)) for _ in range(2))
    W = kind(rng, rng.standard_normal((m, n)), m, n)
    W = W if W.any() else np.ones((m, n))
    dtype = DTYPES[(seed // len(KINDS)) % len(DTYPES)]
    info = ml_dtypes.finfo(dtype)
    # Scales up to where entries overflow, and down to where all but a few bits are gone.
    least, most = int(info.minexp) - int(info.nmant), int(info.maxexp) - 1
    exponent = rng.choice([0, 0, rng.integers(least, most), least + 4, most])
    with np.errstate(over="ignore", under="ignore"):
        return np.clip(
            np.ldexp(W, exponent - peak_exponent(W)), -float(info.max), float(info.max)
        ).astype(dtype)


# --- convolutions --------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A convolution layer, as the arguments of `jsn.Conv`, and its kernel."""

    K: np.ndarray
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: object
    dilation: tuple[int, ...]
    groups: int
    transpose: bool

    def arguments(self) -> dict:
        """The keyword arguments of `jsn.Conv`."""
        channels = self.K.shape[-2] * self.groups
        return {
            "input_shape": (*self.sizes, channels),
            "strides": self.strides,
            "padding": self.padding,
            "kernel_dilation": self.dilation,
            "feature_group_count": self.groups,
            "transpose": self.transpose,
        }


def dense(layer: Layer) -> np.ndarray:
    """The matrix of a layer, inputs by outputs: the layer applied to every unit image."""
    channels = layer.K.shape[-2] * layer.groups
    count = math.prod(layer.sizes) * channels
    x = np.eye(count).reshape(count, *layer.sizes, channels)
    ys = [
        (_upsampled if layer.transpose else _convolved)(part, kernel, layer)
        for part, kernel in zip(
            np.split(x, layer.groups, -1), np.split(layer.K, layer.groups, -1), strict=True
        )
    ]
    return np.concatenate(ys, -1).reshape(count, -1)


def _windows(x: np.ndarray, K: np.ndarray, strides, dilation) -> np.ndarray:
    """A convolution without padding."""
    window = K.shape[:-2]
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:-1], window, strides, dilation, strict=True)
    ]
    y = np.zeros((len(x), *sizes, K.shape[-1]))
    for tap in itertools.product(*map(range, window)):
        at = [
            slice(j * d, j * d + (m - 1) * s + 1, s)
            for j, d, m, s in zip(tap, dilation, sizes, strides, strict=True)
        ]
        y += x[(slice(None), *at)] @ K[tap]
    return y


def _convolved(x: np.ndarray, K: np.ndarray, layer: Layer) -> np.ndarray:
    reach = [(k - 1) * d + 1 for k, d in zip(K.shape, layer.dilation, strict=False)]
    padding, mode = layer.padding, "constant"
    if padding in ("CIRCULAR", "REFLECT"):
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
        pads = [((r - 1) // 2, r // 2) for r in reach]
    elif padding == "CAUSAL":
        pads = [(r - 1, 0) for r in reach]
    elif isinstance(padding, str):
        pads = lax.padtype_to_pads(layer.sizes, reach, layer.strides, padding)
    else:
        pads = padding
    x = np.pad(x, [(0, 0), *pads, (0, 0)], mode=mode)
    return _windows(x, K, layer.strides, layer.dilation)


def _upsampled(x: np.ndarray, K: np.ndarray, layer: Layer) -> np.ndarray:
    """A transposed convolution with zero padding of the upsampled input."""
    big = np.zeros(
        (len(x), *((n - 1) * s + 1 for n, s in zip(layer.sizes, layer.strides, strict=True)),
         x.shape[-1])
    )  # fmt: skip
    big[(slice(None), *(slice(None, None, s) for s in layer.strides))] = x
    big = np.pad(big, [(0, 0), *layer.padding, (0, 0)])
    return _windows(big, K, [1] * len(layer.sizes), layer.dilation)


def hard_layer(seed: int) -> Layer:
    """The seed-th of the convolutions that bounds are tried on."""
    rng = np.random.default_rng(seed)
    rank = int(rng.choice([1, 1, 2, 2, 2, 3]))
    most = {1: 16, 2: 8, 3: 4}[rank]
    sizes, window, strides, dilation = (
        tuple(int(n) for n in rng.integers(low, high, rank))
        for low, high in ((2, most + 1), (1, 5 if rank < 3 else 3), (1, 4), (1, 4))
    )
    transpose = bool(rng.random() < 0.25)
    groups = 1 if transpose else int(rng.choice([1, 1, 2, 3]))
    pads = tuple((int(a), int(b)) for a, b in rng.integers(0, 4, (rank, 2)))
    words = ["SAME", "VALID", "CIRCULAR", "CIRCULAR", "REFLECT", pads]
    words += ["CAUSAL"] if rank == 1 else []
    padding = pads if transpose else words[rng.integers(len(words))]
    ins, outs = (int(n) for n in rng.integers(1, 4, 2))
    K = rng.standard_normal((*window, ins, outs * groups))
    shape = rng.integers(4)
    if shape == 1:  # no cancellation: the maximum lies at frequency 0
        K = np.abs(K)
    elif shape == 2:  # the maximum lies at the highest frequency
        K = np.abs(K) * (-1.0) ** np.indices(window).sum(0)[..., None, None]
    elif shape == 3:  # most of a kernel is 0
        K = K * (rng.random(K.shape) < 0.3)
        K = K if K.any() else np.ones(K.shape)
    layer = Layer(K, sizes, strides, padding, dilation, groups, transpose)
    return layer if _fits(layer) else hard_layer(seed + 10**6)


def _fits(layer: Layer) -> bool:
    """Whether some window lies within the padded input."""
    reach = [(k - 1) * d + 1 for k, d in zip(layer.K.shape, layer.dilation, strict=False)]
    if layer.padding in ("SAME", "CAUSAL", "CIRCULAR"):
        return True
    if layer.padding == "REFLECT":
        return min(layer.sizes) > 1
    ups = layer.strides if layer.transpose else [1] * len(reach)
    sizes = [(n - 1) * up + 1 for n, up in zip(layer.sizes, ups, strict=True)]
    pads = [(0, 0)] * len(reach) if layer.padding == "VALID" else layer.padding
    return all(n + sum(p) >= r for n, p, r in zip(sizes, pads, reach, strict=True))
