"""Part one: a training run is struck by a fault. In how many steps are the norms true again?

A classifier of digits trains with `jsn.normalize` in its step, and Adam behind
`optax.apply_if_finite`. After `BEFORE` healthy steps a fault strikes: in a gradient, in the
weights, in the state. The true norm of every normalized weight, by float64 SVD, is then taken at
each of `AFTER` steps. Recovered is the run from the step on at which all of them stay within
`TOLERANCE` of the bound; the step right after the fault counts as 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jsn

BEFORE, AFTER, TOLERANCE = 40, 30, 1e-3
RULES = (("experts", jsn.Matrix(batch_axis=0)), ("kernel", jsn.Matrix()))
SHAPES = {"dense": (64, 48), "experts": (3, 48, 36), "conv": (2, 2, 9, 40), "head": (40, 10)}
"""Weights of which the block spans a part of a side, and one, the head, where it spans all."""
OPTIMIZER = optax.apply_if_finite(optax.adam(1e-3), max_consecutive_errors=100)


class Carry(NamedTuple):
    """What a training loop carries."""

    params: Any
    state: jsn.SNState
    moments: Any


class Fault(NamedTuple):
    """Something that goes wrong once."""

    name: str
    where: str  # gradient, weight, state
    change: Callable[[Carry], Any]
    """The struck carry; for a gradient, what is added to it."""
    lasts: int = 0
    """After so many steps the parameters, but not the state, are what they were; 0: never."""


class Outcome(NamedTuple):
    """What came of a fault."""

    fault: str
    where: str
    steps: int | None  # to recover; None: not within AFTER
    worst: float  # distance of a norm from the bound, after the fault; infinite where it is NaN
    finite: bool  # parameters and state, at the end


# --- the training run --------------------------------------------------------------------------


def forward(params: Any, x: Any) -> Any:
    """The logits."""
    x = jnp.tanh(x @ params["dense"]["kernel"])
    x = jnp.tanh(jnp.einsum("ni,eij->enj", x, params["experts"]["kernel"]).mean(axis=0))
    x = jnp.tanh(x @ params["conv"]["kernel"].reshape(36, 40))
    return 10 * x @ params["head"]["kernel"]


@jax.jit
def train(carry: Carry, x: Any, y: Any, poison: Any) -> tuple[Carry, Any]:
    """One step: the next carry, and the normalized weights that this step used."""

    def loss(params: Any) -> Any:
        normalized, state = jsn.normalize(params, carry.state)
        losses = optax.softmax_cross_entropy_with_integer_labels(forward(normalized, x), y)
        return losses.mean(), (normalized, state)

    slope, (normalized, state) = jax.grad(loss, has_aux=True)(carry.params)
    slope = jax.tree.map(jnp.add, slope, poison)
    change, moments = OPTIMIZER.update(slope, carry.moments, carry.params)
    return Carry(optax.apply_updates(carry.params, change), state, moments), normalized


@functools.cache
def _digits() -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16 - 0.5, jnp.float32), jnp.asarray(labels, jnp.int32)


def batch(step: int) -> tuple[Any, Any]:
    """The images and labels of a step."""
    images, labels = _digits()
    rows = np.random.default_rng(step).integers(0, len(labels), 64)
    return images[rows], labels[rows]


def start(seed: int = 0) -> Carry:
    """A fresh run."""
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    params = {
        name: {"kernel": jax.random.normal(key, shape) / 6}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return Carry(params, jsn.init(params, rules=RULES), OPTIMIZER.init(params))


def nothing(carry: Carry) -> Any:
    """What is added to the gradient where nothing is wrong."""
    return jax.tree.map(jnp.zeros_like, carry.params)


@functools.cache
def healthy(steps: int = BEFORE) -> Carry:
    """A run before anything has gone wrong."""
    carry = start()
    for step in range(steps):
        carry, _ = train(carry, *batch(step), nothing(carry))
    return carry


def distance(normalized: Any) -> float:
    """How far the true norm of the worst weight is from the bound, which is 1."""
    worst = 0.0
    for name, shape in SHAPES.items():
        W = np.asarray(normalized[name]["kernel"], np.float64)
        if not np.isfinite(W).all():
            return float("inf")
        stack = W if name == "experts" else W.reshape(1, -1, shape[-1])
        norms = np.linalg.svd(stack, compute_uv=False)[:, 0]
        worst = max(worst, float(np.abs(norms - 1).max()))
    return worst


def finite(tree: Any) -> bool:
    """Whether all leaves are."""
    return all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def strike(fault: Fault, after: int = AFTER) -> Outcome:
    """Trains on after a fault, and sees when the norms are true again."""
    before = healthy()
    zero, seen, at = nothing(before), [], BEFORE
    if fault.where == "gradient":
        carry, _ = train(before, *batch(at), fault.change(before))
        at += 1
    else:
        carry = fault.change(before)
    for _ in range(fault.lasts):
        carry, normalized = train(carry, *batch(at), zero)
        seen.append(distance(normalized))
        at += 1
    if fault.lasts:
        carry = carry._replace(params=before.params, moments=before.moments)
    errors = []
    for _ in range(after):
        carry, normalized = train(carry, *batch(at), zero)
        errors.append(distance(normalized))
        at += 1
    wrong = [step for step, error in enumerate(errors) if not error <= TOLERANCE]
    steps = wrong[-1] + 1 if wrong else 0
    return Outcome(
        fault=fault.name,
        where=fault.where,
        steps=steps if steps < after else None,
        worst=max(seen + errors),
        finite=finite((carry.params, carry.state)),
    )


# --- the faults --------------------------------------------------------------------------------


def _entry(value: float) -> Callable[[Carry], Any]:
    """One entry of the gradient of one weight."""

    def poison(carry: Carry) -> Any:
        tree = nothing(carry)
        kernel = tree["dense"]["kernel"].at[3, 5].set(value)
        return {**tree, "dense": {"kernel": kernel}}

    return poison


def _weights(change: Callable[[Any], Any], *names: str) -> Callable[[Carry], Carry]:
    """Changes some weights, or all."""

    def struck(carry: Carry) -> Carry:
        chosen = {
            name: jax.tree.map(change, tree) if name in (names or SHAPES) else tree
            for name, tree in carry.params.items()
        }
        return carry._replace(params=chosen)

    return struck


def _one_entry(value: float) -> Callable[[Any], Any]:
    return lambda x: x.reshape(-1).at[7].set(value).reshape(x.shape)


def _blocks(change: Callable[[Any], Any]) -> Callable[[Carry], Carry]:
    return lambda carry: carry._replace(state=jax.tree.map(change, carry.state))


def _other_weights(carry: Carry) -> Carry:
    """Every weight is drawn anew, as large as it was."""
    other = start(seed=99).params
    scale = lambda new, old: new * (jnp.linalg.norm(old) / jnp.linalg.norm(new))
    return carry._replace(params=jax.tree.map(scale, other, carry.params))


def _without(carry: Carry, directions: int | None) -> Carry:
    """The leading directions of each weight die; None: all that are tracked."""

    def less(W: Any, u: Any) -> Any:
        stack = np.asarray(W, np.float64).reshape(-1, int(np.prod(W.shape[-3:-1])), W.shape[-1])
        if u.ndim == 3:  # experts
            stack = np.asarray(W, np.float64)
        blocks = np.asarray(u, np.float64).reshape(len(stack), -1, W.shape[-1])
        if directions is not None:
            blocks = np.linalg.svd(stack, full_matrices=False)[2][:, :directions]
        elif blocks.shape[1] == W.shape[-1]:
            return W  # nothing would be left
        rest = stack - stack @ blocks.swapaxes(1, 2) @ blocks
        return jnp.asarray(rest.reshape(W.shape), W.dtype)

    return carry._replace(params=jax.tree.map(less, carry.params, carry.state.u))


def _hidden(carry: Carry) -> Carry:
    """The dense weight gains a direction, of twice its norm, orthogonal to all that is tracked."""
    W = np.asarray(carry.params["dense"]["kernel"], np.float64)
    u = np.asarray(carry.state.u["dense"]["kernel"], np.float64)
    b = np.random.default_rng(0).standard_normal(W.shape[1])
    b -= u.T @ (u @ b)
    a = np.random.default_rng(1).standard_normal(W.shape[0])
    a -= W @ np.linalg.pinv(W) @ a  # and to the range of W: a new singular pair
    more = 2 * np.linalg.norm(W, 2) * np.outer(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    kernel = jnp.asarray(W + more, jnp.float32)
    return carry._replace(params={**carry.params, "dense": {"kernel": kernel}})


def _first_state(carry: Carry) -> Carry:
    return carry._replace(state=start().state)


def _average(carry: Carry) -> Carry:
    mean = jax.tree.map(lambda x, y: (x + y) / 2, carry.state, start().state)
    return carry._replace(state=mean)


def _opposite_average(carry: Carry) -> Carry:
    """The mean of a state and its mirror image, which tracks the same: all zeros."""
    mean = jax.tree.map(lambda x: (x + -x) / 2, carry.state)
    return carry._replace(state=mean)


def _strange(carry: Carry) -> Carry:
    return carry._replace(state=start(seed=7).state)


FAULTS = (
    Fault("a NaN in one gradient", "gradient", _entry(np.nan)),
    Fault("an infinity in one gradient", "gradient", _entry(np.inf)),
    Fault("a NaN in one weight, for 1 step", "weight", _weights(_one_entry(np.nan), "dense"), 1),
    Fault("a NaN in one weight, for 10 steps", "weight", _weights(_one_entry(np.nan), "conv"), 10),
    Fault("an infinity in one weight", "weight", _weights(_one_entry(np.inf), "experts"), 1),
    Fault("NaN in every weight", "weight", _weights(lambda x: x * np.nan), 3),
    Fault("zero weights for 1 step", "weight", _weights(jnp.zeros_like), 1),
    Fault("zero weights for 20 steps", "weight", _weights(jnp.zeros_like), 20),
    Fault("one weight 1e6 times as large", "weight", _weights(lambda x: 1e6 * x, "dense")),
    Fault("one weight 1e-6 times as large", "weight", _weights(lambda x: 1e-6 * x, "conv"), 10),
    Fault("all weights 1e30 times as large", "weight", _weights(lambda x: 1e30 * x), 10),
    Fault("all weights 1e-30 times as large", "weight", _weights(lambda x: 1e-30 * x), 10),
    Fault("all signs turn", "weight", _weights(jnp.negative)),
    Fault("inputs and outputs in reverse order", "weight", _weights(lambda x: x[..., ::-1, ::-1])),
    Fault("all weights drawn anew", "weight", _other_weights),
    Fault("the top direction dies", "weight", functools.partial(_without, directions=1)),
    Fault("the top eight directions die", "weight", functools.partial(_without, directions=8)),
    Fault("all tracked directions die", "weight", functools.partial(_without, directions=None)),
    Fault("twice the norm where nothing is tracked", "weight", _hidden),
    Fault("a NaN in each block", "state", _blocks(_one_entry(np.nan))),
    Fault("an infinity in each block", "state", _blocks(_one_entry(np.inf))),
    Fault("blocks of NaN", "state", _blocks(lambda u: u * np.nan)),
    Fault("blocks of zeros", "state", _blocks(jnp.zeros_like)),
    Fault("blocks of ones", "state", _blocks(jnp.ones_like)),
    Fault("one entry of each block is 1e30", "state", _blocks(_one_entry(1e30))),
    Fault("blocks 1e30 times as large", "state", _blocks(lambda u: 1e30 * u)),
    Fault(
        "blocks rounded to bfloat16",
        "state",
        _blocks(lambda u: u.astype(jnp.bfloat16).astype(u.dtype)),
    ),
    Fault("the state of step 0", "state", _first_state),
    Fault("the average with the state of step 0", "state", _average),
    Fault("the average with its own mirror image", "state", _opposite_average),
    Fault("the state of another model", "state", _strange),
)
