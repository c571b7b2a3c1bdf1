"""Certified robustness on real digits: what is proven, beside what an attack achieves.

    python examples/robust_digits.py [--smoke]

A classifier with Lipschitz constant L cannot change its mind within margin / (sqrt(2) L) of a
picture. Four classifiers of one size: plain, with weight decay, with jsn, and with jsn and an
activation that shrinks nothing. For each radius: the share of held-out digits that are right and
provably stay so however they are moved within it, and the share that survives projected gradient
descent. The first can never exceed the second; the script asserts it.

References:
    Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks,
    https://arxiv.org/abs/1706.06083. Anil et al. 2019, Sorting out Lipschitz Function
    Approximation, https://arxiv.org/abs/1811.05381 (GroupSort).
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gallery import BLUE, GREEN, ORANGE, SKY, lines, main, spread
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jsn
from benchmarks._report import table

RADII = np.linspace(0, 1.2, 13)
SHOWN = (1, 3, 6, 9)


# --8<-- [start:model]
def group_sort(x: jax.Array) -> jax.Array:
    """Sorts pairs: like relu it bends, unlike relu it stretches and shrinks nothing."""
    return jnp.sort(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)


class Classifier(nn.Module):
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activation(nn.Dense(128)(x))
        x = self.activation(nn.Dense(128)(x))
        return nn.Dense(10)(x)


class Kind(NamedTuple):
    """A network, and how it is trained: `scale` multiplies the logits in the loss."""

    model: nn.Module
    weight_decay: float = 0.0
    scale: float = 1.0


Normalized = jsn.linen.spectral_norm(Classifier)
KINDS = {
    "plain": Kind(Classifier()),
    "weight decay": Kind(Classifier(), weight_decay=3.0),
    "jsn": Kind(Normalized(), scale=6.0),  # a network of norm 1 has small logits
    "jsn, GroupSort": Kind(Normalized(group_sort), scale=6.0),
}
# --8<-- [end:model]


def load(seed: int) -> tuple[Any, ...]:
    """Pictures as vectors of 64 pixels between 0 and 1; each seed holds out others."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)


@partial(jax.jit, static_argnames=("model", "steps"))
def train(
    model: nn.Module, steps: int, kind: Kind, x: jax.Array, y: jax.Array, key: jax.Array
) -> Any:
    """Trains by cross entropy; what comes back are the weights as the network uses them."""
    init_key, data_key = jax.random.split(key)
    variables = model.init(init_key, x[:1])
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(3e-3, steps), weight_decay=kind.weight_decay
    )

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        variables, opt_state = carry
        rows = jax.random.randint(key, (128,), 0, len(x))

        def loss(params: Any) -> tuple[jax.Array, Any]:
            now = {**variables, "params": params}
            logits, new = model.apply(now, x[rows], mutable=["sn_state"])
            losses = optax.softmax_cross_entropy_with_integer_labels(kind.scale * logits, y[rows])
            return losses.mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    start = (variables, optimizer.init(variables["params"]))
    variables, _ = jax.lax.scan(step, start, jax.random.split(data_key, steps))[0]
    if "sn_state" in variables:
        return jsn.fold(variables["params"], variables["sn_state"])
    return variables["params"]


@partial(jax.jit, static_argnames="model")
def attack(
    model: nn.Module, params: Any, x: jax.Array, y: jax.Array, radius: jax.Array, key: jax.Array
) -> jax.Array:
    """Which pictures keep their label under one run of projected gradient descent in l2."""
    unit = lambda d: d / jnp.maximum(jnp.linalg.norm(d, axis=-1, keepdims=True), 1e-12)

    def lead(d: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, x + d)
        right = jnp.take_along_axis(logits, y[:, None], axis=-1)
        others = jnp.where(jax.nn.one_hot(y, logits.shape[-1], dtype=bool), -jnp.inf, logits)
        return right[:, 0] - others.max(axis=-1)

    def step(d: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        d -= radius / 8 * unit(jax.grad(lambda d: lead(d).sum())(d))
        norm = jnp.linalg.norm(d, axis=-1, keepdims=True)
        d *= jnp.minimum(1, radius / jnp.maximum(norm, 1e-12))
        return d, lead(d) > 0

    start = radius * unit(jax.random.normal(key, x.shape))
    _, stays = jax.lax.scan(step, start, length=40)
    return stays.all(axis=0) & (lead(jnp.zeros_like(x)) > 0)


def evaluate(kind: Kind, params: Any, x: Any, y: Any, radii: Any, restarts: int) -> dict[str, Any]:
    model = Classifier(kind.model.activation)
    logits_of = lambda x: model.apply({"params": params}, x)
    logits = logits_of(x)
    bound = jsn.lipschitz_bound(logits_of, x[0])
    attacked = []
    for radius in radii:
        keys = jax.random.split(jax.random.key(1), restarts)
        runs = [attack(model, params, x, y, jnp.float32(radius), key) for key in keys]
        attacked.append(np.all(runs, axis=0).mean())
    return {
        "bound": bound,
        "accuracy": np.mean(np.argmax(logits, axis=-1) == y),
        "certified": jsn.certified_accuracy(logits, y, bound, radii),
        "attacked": attacked,
    }


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    names = ["jsn, GroupSort"] if smoke else list(KINDS)
    seeds, steps, restarts = ([0], 200, 1) if smoke else (list(range(5)), 1500, 2)
    radii = RADII[list(SHOWN)] if smoke else RADII
    rows = []
    task = progress.add_task("classifiers", total=len(names) * len(seeds))
    for name in names:
        kind, found = KINDS[name], []
        for seed in seeds:
            train_x, test_x, train_y, test_y = load(seed)
            numbers = kind._replace(model=None)
            params = train(kind.model, steps, numbers, train_x, train_y, jax.random.key(seed))
            found.append(evaluate(kind, params, test_x, test_y, radii, restarts))
            progress.advance(task)
        rows.append({"model": name, **{key: [f[key] for f in found] for key in found[0]}})
    return {"seeds": seeds, "steps": steps, "radii": radii, "rows": rows}


def check(result: dict[str, Any]) -> None:
    rows = {row["model"]: {k: np.array(v) for k, v in row.items()} for row in result["rows"]}
    for name, row in rows.items():
        assert (row["certified"] <= row["attacked"]).all(), f"{name}: an attack has beaten a proof"
        assert (row["accuracy"] > 0.9).all(), f"{name}: has not learned the digits"
        if name.startswith("jsn"):
            assert np.allclose(row["bound"], 1, atol=0.01), f"{name}: bound {row['bound']}, not 1"
    third = result["radii"].index(0.3)
    best = rows["jsn, GroupSort"]["certified"][:, third]
    assert (best > 0.5).all(), "jsn, GroupSort: hardly anything is proven"
    for name in ("plain", "weight decay"):
        if name in rows:
            assert best.min() > rows[name]["certified"][:, third].max(), f"{name}: proves as much"


def at(result: dict[str, Any], row: dict[str, Any], what: str, radius: float) -> str:
    return spread(np.array(row[what])[:, result["radii"].index(radius)], ".1f", 100)


def parts(result: dict[str, Any]) -> dict[str, str]:
    rows, radii = result["rows"], [round(0.1 * i, 1) for i in SHOWN]
    proven = "; ".join(f"{row['model']} {at(result, row, 'certified', 0.3)}" for row in rows)
    grid = lambda what: table(
        ["%", *[f"radius {radius:g}" for radius in radii]],
        [[row["model"], *[at(result, row, what, radius) for radius in radii]] for row in rows],
    )
    return {
        "headline": f"Percent of held-out digits proven right within a radius of 0.3: {proven}.",
        "accuracy": table(
            ["", "accuracy, %", "Lipschitz bound"],
            [
                [row["model"], spread(row["accuracy"], ".1f", 100), spread(row["bound"])]
                for row in rows
            ],
        ),
        "certified": grid("certified"),
        "attacked": grid("attacked"),
    }


def draw(result: dict[str, Any], figure: Any) -> None:
    colors = {"plain": ORANGE, "weight decay": GREEN, "jsn": SKY, "jsn, GroupSort": BLUE}
    for axes, what in zip(
        figure.subplots(1, 2, sharey=True), ("certified", "attacked"), strict=True
    ):
        for row in result["rows"]:
            percent = 100 * np.array(row[what])
            lines(axes, result["radii"], percent, row["model"], color=colors[row["model"]])
        axes.set(xlabel="l2 radius (pixels from 0 to 1)", ylim=(0, 102), xlim=(0, RADII[-1]))
        axes.grid(alpha=0.25)
    left, right = figure.axes
    left.set(title="Proven: right, and stays so", ylabel="held-out digits, %")
    right.set(title="Survive this attack (PGD)")
    right.legend(fontsize=8)


if __name__ == "__main__":
    main("robust_digits", __doc__, measure=measure, check=check, parts=parts, draw=draw)
