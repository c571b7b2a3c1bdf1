"""The copying task at lengths 100 to 1000: a recurrent matrix whose norm is kept at 1, two ways.

    python examples/long_memory.py [--smoke]

Three symbols, then nothing for a hundred to a thousand steps, then the question what they were.
The gradient reaches them through as many products with the recurrent matrix. Above a norm of 1 it
can explode; at most 1 it cannot, but it can vanish.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gallery import BLUE, GREEN, ORANGE, lines, main, spread

import jsn
from benchmarks._report import table

LENGTHS, RATES = (100, 300, 1000), (1e-3, 1e-4)
BATCH, N_SYMBOLS, N_COPIED = 16, 8, 3


# --8<-- [start:model]
class Copier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cell = nn.SimpleCell(64, recurrent_kernel_init=nn.initializers.orthogonal())
        last = nn.RNN(cell, name="rnn")(x)[:, -1]
        return nn.Dense(N_COPIED * N_SYMBOLS)(last).reshape(-1, N_COPIED, N_SYMBOLS)


recurrent = ((r"/h/kernel$", jsn.Matrix()),)
# Divided: W / sigma in the forward pass, once for a sequence. All singular values shrink.
Divided = jsn.linen.spectral_norm(Copier, rules=recurrent)
# Capped: after each update, the singular values above 1 become 1. The others stay.
cap = jsn.optim.hard_cap(1.0, rules=recurrent)
MODELS = {
    "plain": (Copier(), optax.identity()),
    "jsn, divided": (Divided(), optax.identity()),
    "jsn, capped": (Copier(), cap),
}
# --8<-- [end:model]


def draw_batch(key: jax.Array, length: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The symbols, one-hot, and then `length` steps of nothing; and the symbols as numbers."""
    symbols = jax.random.randint(key, (size, N_COPIED), 0, N_SYMBOLS)
    shown = jax.nn.one_hot(symbols, N_SYMBOLS)
    return jnp.pad(shown, ((0, 0), (0, length), (0, 0))), symbols


@partial(jax.jit, static_argnames=("name", "length", "steps"))
@partial(jax.vmap, in_axes=(None, None, None, 0, 0))
def train(name: str, length: int, steps: int, rate: jax.Array, key: jax.Array) -> Any:
    """The trained variables; gradients are clipped to a norm of 1, for all alike."""
    model, constraint = MODELS[name]
    init_key, data_key = jax.random.split(key)
    variables = model.init(init_key, jnp.zeros((1, 2, N_SYMBOLS)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate), constraint)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        variables, opt_state = carry
        x, symbols = draw_batch(key, length, BATCH)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, new = model.apply({**variables, "params": params}, x, mutable=["sn_state"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, symbols)
            return loss.mean(), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    start = (variables, optimizer.init(variables["params"]))
    return jax.lax.scan(step, start, jax.random.split(data_key, steps))[0][0]


@partial(jax.jit, static_argnames=("name", "length"))
@partial(jax.vmap, in_axes=(None, None, 0))
def examine(name: str, length: int, variables: Any) -> tuple[jax.Array, jax.Array]:
    """On fresh sequences: the accuracy, and the norm of the loss's gradient at each input."""
    model, _ = MODELS[name]
    x, symbols = draw_batch(jax.random.key(12345), length, 128)

    def loss_fn(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(variables, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, symbols)
        return loss.sum(), (logits.argmax(-1) == symbols).mean()

    slope, accuracy = jax.grad(loss_fn, has_aux=True)(x)
    return accuracy, jnp.sqrt((slope**2).sum(-1).mean(0))


def recurrent_norm(variables: Any) -> float:
    """Of the matrix as the network uses it, by SVD; NaN where it is not finite."""
    params = variables["params"]
    if "sn_state" in variables:
        params, _ = jsn.normalize(params, variables["sn_state"], n_steps=0)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernel = next(leaf for path, leaf in leaves if "['h']" in jax.tree_util.keystr(path))
    kernel = np.asarray(kernel, np.float64)
    return float(np.linalg.norm(kernel, 2)) if np.isfinite(kernel).all() else np.nan


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    names = [name for name in MODELS if "jsn" in name] if smoke else list(MODELS)
    lengths, rates, seeds, steps = LENGTHS, RATES, [0, 1, 2], 400
    if smoke:
        lengths, rates, seeds, steps = (30,), (1e-3,), [0], 40
    rows = []
    grid = [(rate, seed) for rate in rates for seed in seeds]  # trained side by side
    each_rate, each_key = jnp.array([r for r, _ in grid]), [jax.random.key(s) for _, s in grid]
    runs = [(length, name) for length in lengths for name in names]
    for length, name in progress.track(runs, description="lengths and networks"):
        trained = train(name, length, steps, each_rate, jnp.stack(each_key))
        accuracy, gradient = jax.device_get(examine(name, length, trained))
        thinned = gradient[:, :: -max(1, length // 100)][:, ::-1]
        norms = [recurrent_norm(jax.tree.map(lambda x: x[i], trained)) for i in range(len(grid))]  # noqa: B023
        for rate in rates:
            mine = [i for i, (r, _) in enumerate(grid) if r == rate]
            row = {"model": name, "length": length, "rate": rate, "accuracy": accuracy[mine]}
            norm = [norms[i] for i in mine]
            rows.append({**row, "norm": norm, "gradient": thinned[mine]})
    return {"seeds": seeds, "steps": steps, "rows": rows}


def check(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if "jsn" in row["model"]:
            assert np.max(row["norm"]) < 1.001, f"norm {row['norm']}, expected 1 at most"
    accuracy = {key: np.median(row["accuracy"]) for key, row in best(result).items()}
    if len(result["rows"]) == 2:  # smoke: at length 30 even forty steps teach something
        assert accuracy["jsn, capped", 30] > 2 / N_SYMBOLS, "capped: no better than guessing"
    else:
        assert accuracy["jsn, capped", 300] > accuracy["plain", 300], "capped: no longer memory"


def best(result: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    """By network and length: the row of the learning rate with the best median accuracy."""
    rows = sorted(result["rows"], key=lambda row: np.median(np.array(row["accuracy"], float)))
    return {(row["model"], row["length"]): row for row in rows}


def parts(result: dict[str, Any]) -> dict[str, str]:
    cells = best(result)
    names = list(dict.fromkeys(row["model"] for row in result["rows"]))
    lengths = sorted({row["length"] for row in result["rows"]})
    grid = lambda cell: [[name, *[cell(cells[name, n]) for n in lengths]] for name in names]
    reach = lambda row: [line[0] / line[-1] for line in np.array(row["gradient"], float)]
    accuracy = lambda row: spread(row["accuracy"], ".0f", 100)
    longest = "; ".join(f"{name} {accuracy(cells[name, lengths[-1]])}" for name in names)
    head = ["", *map(str, lengths)]
    return {
        "headline": f"Symbols remembered at length {lengths[-1]}, % (12.5 by guessing): {longest}.",
        "accuracy": table(head, grid(accuracy)),
        "rate": table(head, grid(lambda row: f"{row['rate']:g}")),
        "norm": table(head, grid(lambda row: spread(row["norm"], ".4g"))),
        "reach": table(head, grid(lambda row: spread(reach(row), ".2g"))),
    }


def draw(result: dict[str, Any], figure: Any) -> None:
    colors = dict(zip(MODELS, (ORANGE, GREEN, BLUE), strict=True))
    lengths = sorted({row["length"] for row in result["rows"]})
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        for (name, n), row in sorted(best(result).items()):
            if n == length:
                relative = np.array([g / g[-1] for g in np.array(row["gradient"], float)])
                steps = np.linspace(0, length, relative.shape[1])
                lines(axes, steps, np.maximum(relative, 1e-12), name, color=colors[name])
        axes.set(yscale="log", xlabel="time step of the input", title=f"length {length}")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("gradient, relative to the last step")
    panels[-1].legend(fontsize=8)


if __name__ == "__main__":
    main("long_memory", __doc__, measure=measure, check=check, parts=parts, draw=draw)
