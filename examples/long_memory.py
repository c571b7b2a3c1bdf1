"""The adding task at lengths 100 to 1000: a recurrent matrix whose norm is kept at 1.

    python examples/long_memory.py [--smoke]

A sequence of numbers between 0 and 1, two of them marked, one early and one anywhere later; the
answer is their sum. The gradient reaches the early one through as many products with the
recurrent matrix as there are steps between: above a norm of 1 it can explode, and with a norm
of 1 it cannot.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gallery import BLUE, GREEN, ORANGE, PINK, main, spread

import jsn
from benchmarks._report import table

LENGTHS = (100, 300, 1000)
BATCH, RATE = 32, 1e-3


# --8<-- [start:model]
def max_min(x: jax.Array) -> jax.Array:
    """Sorts pairs: it bends as relu does, but neither stretches nor shrinks."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return jnp.concatenate([pairs.max(axis=-1), pairs.min(axis=-1)], axis=-1)


class Adder(nn.Module):
    activation: Any = nn.tanh

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cell = nn.SimpleCell(
            32, self.activation, recurrent_kernel_init=nn.initializers.orthogonal()
        )
        return nn.Dense(1)(nn.RNN(cell, name="rnn")(x)[:, -1])[:, 0]


recurrent = ((r"/h/kernel$", jsn.Matrix()),)
# Divided: W / sigma in the forward pass, once for a sequence. Every singular value shrinks.
Divided = jsn.linen.spectral_norm(Adder, rules=recurrent)
# Capped: after each update the singular values above 1 become 1. The others stay.
cap = jsn.optim.hard_cap(1.0, rules=recurrent)
MODELS = {
    "plain, tanh": (Adder(), None),
    "plain, max_min": (Adder(max_min), None),
    "jsn divided, max_min": (Divided(max_min), None),
    "jsn capped, max_min": (Adder(max_min), cap),
}
# --8<-- [end:model]


def draw_batch(key: jax.Array, length: int, size: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Sequences `(size, length, 2)` of numbers and marks; the first mark is in the first tenth."""
    keys = jax.random.split(key, 3)
    numbers = jax.random.uniform(keys[0], (size, length))
    early = jax.random.randint(keys[1], (size,), 0, length // 10)
    late = jax.random.randint(keys[2], (size,), length // 10, length)
    marks = jax.nn.one_hot(early, length) + jax.nn.one_hot(late, length)
    return jnp.stack([numbers, marks], axis=-1), (numbers * marks).sum(axis=-1)


def squared_error(model: nn.Module, variables: Any, x: jax.Array, y: jax.Array) -> tuple:
    """And the next state of the collection, where there is one."""
    guesses, new = model.apply(variables, x, mutable=["sn_state"])
    return ((guesses - y) ** 2).mean(), new


@partial(jax.jit, static_argnames=("name", "length", "steps"))
def train(name: str, length: int, steps: int, key: jax.Array) -> Any:
    """The trained variables; gradients are clipped, for all alike."""
    model, constraint = MODELS[name]
    init_key, data_key = jax.random.split(key)
    variables = model.init(init_key, jnp.zeros((1, 2, 2)))
    adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam, constraint or optax.identity())

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        variables, opt_state = carry
        x, y = draw_batch(key, length)
        loss_fn = lambda params: squared_error(model, {**variables, "params": params}, x, y)
        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    start = (variables, optimizer.init(variables["params"]))
    return jax.lax.scan(step, start, jax.random.split(data_key, steps))[0][0]


@partial(jax.jit, static_argnames=("model", "length"))
def examine(model: nn.Module, length: int, variables: Any) -> tuple[jax.Array, jax.Array]:
    """On fresh sequences: the error, and the norm of the answer's gradient at each input."""
    x, y = draw_batch(jax.random.key(12345), length, 256)
    slope = jax.grad(lambda x: model.apply(variables, x).sum())(x[:64])
    norms = jnp.sqrt((slope**2).sum(-1).mean(0))
    return ((model.apply(variables, x) - y) ** 2).mean(), norms


def recurrent_kernel(params: Any) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return next(leaf for path, leaf in leaves if "['h']" in jax.tree_util.keystr(path))


def recurrent_norm(variables: Any) -> float:
    """Of the matrix as the network uses it, by SVD."""
    params = variables["params"]
    if "sn_state" in variables:
        params, _ = jsn.normalize(params, variables["sn_state"], n_steps=0)
    kernel = np.asarray(recurrent_kernel(params), np.float64)
    return float(np.linalg.svd(kernel, compute_uv=False)[0])


def untrained(name: str, length: int, norm: float = 1.05) -> dict[str, Any]:
    """The gradient before training, with a recurrent matrix that stretches all alike by `norm`."""
    model, _ = MODELS[name]
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2, 2)))
    first = recurrent_kernel(variables["params"])
    enlarge = lambda leaf: norm * leaf if leaf is first else leaf
    params = jax.tree.map(enlarge, variables["params"])
    _, gradient = jax.device_get(examine(model, length, {**variables, "params": params}))
    return {"model": name, "untrained": norm, "length": length, "gradient": [thin(gradient)]}


def thin(gradient: np.ndarray) -> np.ndarray:
    """At most a hundred time steps of it, the last one among them."""
    return gradient[:: -max(1, len(gradient) // 100)][::-1]


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    names = [name for name in MODELS if "jsn" in name] if smoke else list(MODELS)
    lengths, seeds, steps = ((40,), [0], 20) if smoke else (LENGTHS, [0, 1, 2], 1500)
    rows = [untrained(name, lengths[-1]) for name in MODELS if "capped" not in name]
    task = progress.add_task("sequences", total=len(names) * len(lengths) * len(seeds))
    for length in lengths:
        for name in names:
            found = []
            for seed in seeds:
                variables = train(name, length, steps, jax.random.key(seed))
                error, gradient = jax.device_get(examine(MODELS[name][0], length, variables))
                found.append((error, recurrent_norm(variables), thin(gradient)))
                progress.advance(task)
            error, norm, gradient = zip(*found, strict=True)
            row = {"model": name, "length": length, "error": error, "norm": norm}
            rows.append({**row, "gradient": gradient})
    return {"seeds": seeds, "steps": steps, "rows": rows}


def reach(row: dict[str, Any]) -> np.ndarray:
    """Of each seed: the gradient about the first input over that at the last."""
    gradient = np.array(row["gradient"], float)
    return gradient[:, 0] / gradient[:, -1]


def check(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if "untrained" in row:
            expected = 1 if "jsn" in row["model"] else row["untrained"] ** row["length"]
            if "tanh" not in row["model"]:  # max_min loses nothing: only directions differ
                assert 1 / 3 < reach(row)[0] / expected < 3, f"{row['model']}: {reach(row)}"
        elif row["model"].startswith("jsn"):
            assert np.max(row["norm"]) < 1.001, f"norm {row['norm']}, expected 1 at most"
            assert np.isfinite(np.array(row["error"], float)).all(), "jsn: diverged"


def parts(result: dict[str, Any]) -> dict[str, str]:
    trained = [row for row in result["rows"] if "untrained" not in row]
    lengths = sorted({row["length"] for row in trained})
    names = list(dict.fromkeys(row["model"] for row in trained))
    cells = {(row["model"], row["length"]): row for row in trained}
    before = [
        [row["model"], f"{reach(row)[0]:.2g}"] for row in result["rows"] if "untrained" in row
    ]
    grid = lambda cell: [[name, *[cell(cells[name, n]) for n in lengths]] for name in names]
    head = ["", *map(str, lengths)]
    first = lengths[0]
    errors = "; ".join(f"{name} {spread(cells[name, first]['error'])}" for name in names)
    return {
        "headline": f"Squared error at length {first} (0.17 knows nothing): {errors}.",
        "untrained": table(["", f"reach at length {lengths[-1]}"], before),
        "error": table(head, grid(lambda row: spread(row["error"]))),
        "norm": table(head, grid(lambda row: spread(row["norm"], ".4g"))),
        "reach": table(head, grid(lambda row: spread(reach(row), ".2g"))),
    }


def draw(result: dict[str, Any], figure: Any) -> None:
    colors = dict(zip(MODELS, (PINK, ORANGE, BLUE, GREEN), strict=True))
    key = lambda row: (row["length"] if "untrained" not in row else 0, "untrained" not in row)
    groups = sorted({key(row) for row in result["rows"]})
    figure.set_size_inches(11, 4)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        for row in (row for row in result["rows"] if key(row) == group):
            for i, line in enumerate(np.array(row["gradient"], float)):
                steps = np.linspace(0, row["length"], len(line))
                label = row["model"] if i == 0 else None
                shown = np.maximum(line, 1e-12)
                axes.plot(steps, shown, color=colors[row["model"]], lw=1.2, label=label)
        title = f"trained, length {group[0]}" if group[1] else "before training, norm 1.05"
        axes.set(yscale="log", xlabel="time step of the input", title=title)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("gradient of the answer")
    panels[-1].legend(fontsize=8, loc="best")


if __name__ == "__main__":
    main("long_memory", __doc__, measure=measure, check=check, parts=parts, draw=draw)
