"""Certified robustness on real digits: what is proven, beside what an attack achieves.

Two classifiers of one architecture, with and without `jsn.linen.spectral_norm`. For each: the
share of held-out digits that are right and provably stay so when every picture is moved by up to
a radius (`jsn.certified_accuracy`), and the share that survives projected gradient descent. The
first can never exceed the second; the script asserts it.

    python examples/robust_digits.py [--out docs/img/robust_digits.png]

References:
    Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks,
    https://arxiv.org/abs/1706.06083. Anil et al. 2019, Sorting out Lipschitz Function
    Approximation, https://arxiv.org/abs/1811.05381 (the activation).
"""

import argparse
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jsn

RADII = np.linspace(0, 1.2, 13)
SHOWN = RADII[::3]


def max_min(x: jax.Array) -> jax.Array:
    """Sorts pairs: like relu it bends, unlike relu it stretches and shrinks nothing."""
    return jnp.sort(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_min(nn.Dense(128)(x))
        x = max_min(nn.Dense(128)(x))
        return nn.Dense(10)(x)


class Result(NamedTuple):
    name: str
    accuracy: float
    bound: float
    certified: np.ndarray
    attacked: np.ndarray


def load(seed: int) -> tuple[np.ndarray, ...]:
    """Pictures as vectors of 64 pixels between 0 and 1."""
    digits = load_digits()
    return train_test_split(
        (digits.data / 16).astype(np.float32),
        digits.target.astype(np.int32),
        test_size=0.25,
        random_state=seed,
        stratify=digits.target,
    )


def train(model: Any, x: np.ndarray, y: np.ndarray, seed: int, steps: int, scale: float) -> Any:
    """Trains by cross entropy of the scaled logits: a network of norm 1 has small ones."""
    key, init_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, x[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    images, labels = jnp.asarray(x), jnp.asarray(y)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        variables, opt_state = carry
        rows = jax.random.randint(key, (128,), 0, len(images))

        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = model.apply(
                {**variables, "params": params}, images[rows], mutable=["sn_state"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(scale * logits, labels[rows])
            return losses.mean(), updates

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    start = (variables, optimizer.init(variables["params"]))
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    return run(start, jax.random.split(key, steps))[0][0]


def logits_of(params: Any, x: jax.Array) -> jax.Array:
    return Classifier().apply({"params": params}, x)


@jax.jit
def attack(params: Any, x: jax.Array, y: jax.Array, radius: jax.Array, key: jax.Array) -> jax.Array:
    """Which pictures keep their label under one run of projected gradient descent in l2."""

    def project(d: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(d, axis=-1, keepdims=True)
        return d * jnp.minimum(1, radius / jnp.maximum(norm, 1e-12))

    def lead(d: jax.Array) -> jax.Array:
        logits = logits_of(params, x + d)
        right = jnp.take_along_axis(logits, y[:, None], axis=-1)
        others = jnp.where(jax.nn.one_hot(y, 10, dtype=bool), -jnp.inf, logits)
        return right[:, 0] - others.max(axis=-1)

    def step(d: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        slope = jax.grad(lambda d: lead(d).sum())(d)
        slope /= jnp.maximum(jnp.linalg.norm(slope, axis=-1, keepdims=True), 1e-12)
        d = project(d - radius / 8 * slope)
        return d, lead(d) > 0

    noise = jax.random.normal(key, x.shape)
    start = project(radius * noise / jnp.linalg.norm(noise, axis=-1, keepdims=True))
    _, stays = jax.lax.scan(step, start, length=40)
    return stays.all(axis=0) & (lead(jnp.zeros_like(x)) > 0)


def evaluate(name: str, params: Any, x: np.ndarray, y: np.ndarray, restarts: int = 3) -> Result:
    logits = logits_of(params, x)
    bound = jsn.lipschitz_bound(lambda x: logits_of(params, x), x[0])
    certified = jsn.certified_accuracy(logits, y, bound, RADII)
    keys = jax.random.split(jax.random.key(1), restarts)
    attacked = []
    for radius in RADII:
        runs = [attack(params, x, y, jnp.float32(radius), key) for key in keys]
        attacked.append(np.all(runs, axis=0).mean())
    assert (certified <= np.asarray(attacked)).all(), "an attack has beaten a proof"
    accuracy = float((np.argmax(logits, axis=-1) == y).mean())
    return Result(name, accuracy, bound, certified, np.asarray(attacked))


def draw(results: list[Result], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for result, color in zip(results, ("C0", "C3"), strict=True):
        proven = f"{result.name}: proven, Lipschitz bound {result.bound:.3g}"
        axes.fill_between(RADII, result.certified, result.attacked, color=color, alpha=0.12, lw=0)
        axes.plot(RADII, result.certified, color=color, label=proven)
        under_attack = f"{result.name}: under attack (PGD)"
        axes.plot(RADII, result.attacked, "--", color=color, label=under_attack)
    axes.set(xlabel="l2 radius (pixels from 0 to 1)", ylabel="accuracy", xlim=(0, RADII[-1]))
    axes.set(ylim=(0, 1.02), title="Digits that stay right when pictures move")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="draw a picture")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    train_x, test_x, train_y, test_y = load(options.seed)
    fit = lambda model, scale: train(model, train_x, train_y, options.seed, options.steps, scale)
    plain = fit(Classifier(), 1.0)
    normalized = fit(jsn.linen.spectral_norm(Classifier)(), 6.0)
    folded = jsn.fold(normalized["params"], normalized["sn_state"])
    results = [
        evaluate("with jsn", folded, test_x, test_y),
        evaluate("without", plain["params"], test_x, test_y),
    ]
    print(f"{'':10}{'bound':>10}{'accuracy':>10}   proven / under attack, at radius")
    print(" " * 33 + "".join(f"{radius:>13.1f}" for radius in SHOWN))
    for r in results:
        at = "".join(
            f"{c:>7.3f}/{a:.3f}" for c, a in zip(r.certified[::3], r.attacked[::3], strict=True)
        )
        print(f"{r.name:10}{r.bound:>10.4g}{r.accuracy:>10.3f}   {at}")
    if options.out:
        draw(results, options.out)
    return results


if __name__ == "__main__":
    main()
