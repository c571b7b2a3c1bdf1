"""Which weights are normalized, how they move, and how large they truly are.

In: the name of a case. Out: raw weights as numpy arrays by name, the same weights a few training
steps further, and float64 norms. Must not know who normalizes them, or what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

Weights = Mapping[str, np.ndarray]

DIRECTIONS = 10
"""Directions of each weight that training is after at once, as with ten classes."""
RATE = 0.025
"""By how much of its norm a weight moves in a step: what Adam does at 0.001."""
PERIOD = 24
"""Steps after which the same direction is ahead again."""


class Case(NamedTuple):
    """Weights of a network.

    Attributes:
        title: its name for readers.
        shapes: one shape for each weight, outputs last.
        stacked: the first axis counts layers, as `nn.scan` stacks them.
    """

    title: str
    shapes: tuple[tuple[int, ...], ...]
    stacked: bool = False


def _vit(width: int, depth: int = 12, classes: int = 1000) -> tuple[tuple[int, ...], ...]:
    """Query, key, value, output and the two layers of the MLP, `depth` times."""
    block = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    return ((16, 16, 3, width), *block * depth, (width, classes))


def _resnet50() -> tuple[tuple[int, ...], ...]:
    shapes, inputs = [(7, 7, 3, 64)], 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(depth):
            shapes += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            shapes += [(1, 1, inputs, 4 * width)] if index == 0 else []
            inputs = 4 * width
    return (*shapes, (inputs, 1000))


CRITIC = ((64, 3), (64, 4), (128, 3), (128, 4), (256, 3), (256, 4), (512, 3))
"""Features and window of the SN-GAN critic for 32 x 32 pictures; a window of 4 has stride 2."""


def _critic() -> tuple[tuple[int, ...], ...]:
    inputs = (3, *[features for features, _ in CRITIC])
    kernels = [(n, n, c, m) for c, (m, n) in zip(inputs, CRITIC, strict=False)]
    return (*kernels, (4 * 4 * 512, 1))


def _scanned(width: int, depth: int) -> tuple[tuple[int, ...], ...]:
    return tuple((depth, *shape) for shape in _vit(width, 1)[1:-1])


CASES = {
    "small": Case("64 × (64×64)", ((64, 64),) * 64),
    "vit_ti": Case("ViT-Ti", _vit(192)),
    "vit_s": Case("ViT-S", _vit(384)),
    "resnet50": Case("ResNet-50", _resnet50()),
    "critic": Case("SN-GAN critic", _critic()),
    "scanned": Case("48 scanned layers", _scanned(192, 48), stacked=True),
}
SMOKE_CASES = {
    "small": Case("4 × (16×16)", ((16, 16),) * 4),
    "scanned": Case("3 scanned layers", _scanned(16, 3), stacked=True),
}


def trajectory(case: Case, steps: int, seed: int = 0) -> Iterator[Weights]:
    """Raw weights at the start, and after each step of something like training.

    Each weight begins as a Gaussian matrix of norm 1/2, plus ten strong directions of size 1, equal
    within a few per cent. Every step moves each of them by up to 2.5 per cent, in turns: one takes
    over from the other, which is what normalization brings about while it trains. Two fresh
    random directions a step stand for the noise of a batch.

    The arrays are overwritten by the next step.
    """
    rng = np.random.default_rng(seed)
    weights, moves = {}, {}
    for index, shape in enumerate(case.shapes):
        name = f"layer_{index:04d}"
        batch, rows = _split(case, shape)
        scale = 0.5 / (math.sqrt(rows) + math.sqrt(shape[-1]))  # a Gaussian matrix of norm 1/2
        flat = rng.standard_normal((batch, rows, shape[-1]), np.float32) * np.float32(scale)
        rank = min(DIRECTIONS, rows, shape[-1])
        left, right = (_directions(rng, batch, n, rank) for n in (rows, shape[-1]))
        left, right = np.linalg.qr(left)[0], np.linalg.qr(right)[0]
        sizes = rng.uniform(0.98, 1.02, rank).astype(np.float32)
        flat += (left * sizes) @ right.swapaxes(1, 2)
        weights[name], moves[name] = flat.reshape(shape), (flat, left, right)
    yield weights
    for step in range(steps):
        for flat, left, right in moves.values():
            phases = 2 * np.pi * (step / PERIOD + np.arange(left.shape[-1]) / left.shape[-1])
            sizes = (RATE * np.cos(phases)).astype(np.float32)
            batch, rows, columns = flat.shape
            flat += (left * sizes) @ right.swapaxes(1, 2)
            noise = (_directions(rng, batch, n, 2) for n in (rows, columns))
            flat += np.float32(RATE / 2) * (next(noise) @ next(noise).swapaxes(1, 2))
        yield weights


def _split(case: Case, shape: tuple[int, ...]) -> tuple[int, int]:
    """Layers, and inputs of each."""
    return (shape[0], math.prod(shape[1:-1])) if case.stacked else (1, math.prod(shape[:-1]))


def _directions(rng: np.random.Generator, batch: int, n: int, rank: int) -> np.ndarray:
    """Columns of length one, as good as orthogonal."""
    made = rng.standard_normal((batch, n, rank), np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def true_norms(case: Case, weights: Weights) -> dict[str, np.ndarray]:
    """The largest singular value of every layer, from its smaller Gram matrix in float64."""
    import scipy.linalg

    found = {}
    for name, W in weights.items():
        norms = []
        for matrix in _layers(case, W).astype(np.float64):
            gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
            last = len(gram) - 1
            top = scipy.linalg.eigh(gram, eigvals_only=True, subset_by_index=[last, last])
            norms.append(math.sqrt(top[0]))
        found[name] = np.array(norms)
    return found


def worst_norm(case: Case, raw: Weights, norms: Mapping[str, np.ndarray], handed: Weights) -> float:
    """The largest norm of any layer *as it is handed to the model*.

    What is handed out is a multiple of the raw weight, up to rounding: where that holds, its norm
    is that multiple of the raw weight's. Where it does not, the norm is computed anew.
    """
    worst = 0.0
    for name, W in raw.items():
        before, after = _layers(case, W), _layers(case, np.asarray(handed[name]).reshape(W.shape))
        factors = np.einsum("bij,bij->b", before, after) / np.einsum("bij,bij->b", before, before)
        rest = np.linalg.norm(after - factors[:, None, None] * before, axis=(1, 2))
        size = np.linalg.norm(after, axis=(1, 2))
        if np.all(rest <= 1e-6 * size):
            worst = max(worst, float(np.max(np.abs(factors) * norms[name])))
        else:
            worst = max(worst, float(true_norms(case, {name: after.reshape(W.shape)})[name].max()))
    return worst


def _layers(case: Case, W: np.ndarray) -> np.ndarray:
    """A weight as matrices `(layers, inputs, outputs)`."""
    return W.reshape(*_split(case, W.shape), W.shape[-1])
