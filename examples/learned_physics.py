"""A learned simulator, rolled out ten thousand steps: the plain one blows up, jsn's cannot.

    python examples/learned_physics.py [--smoke]

Heat in a ring, whose conductivity falls where the temperature is steep. A network learns one step
of it from noisy measurements and is then applied to its own output. The equation brings any two
states closer together, so a network of Lipschitz constant 1 can learn it; and one that has it
provably cannot leave the ball it starts in. A second equation pushes states apart: there the same
constraint is in the way.

References:
    Sanchez-Gonzalez et al. 2020, Learning to Simulate Complex Physics with Graph Networks,
    https://arxiv.org/abs/2002.09405 (noise on the inputs, the usual remedy).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gallery import BLUE, GREEN, GREY, ORANGE, PINK, lines, main, spread

import jsn
from benchmarks._report import table

POINTS, NOISE, BATCH, N_TRAJECTORIES = 64, 0.01, 128, 20
EQUATIONS = {"diffusion": 0.0, "diffusion and growth": 0.05}  # what grows per step
SHOWN = (1, 10, 100, 1000, 10000)


# --8<-- [start:model]
def max_min(x: jax.Array) -> jax.Array:
    """Sorts pairs: it bends as relu does, but neither stretches nor shrinks."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_min(nn.Dense(128)(x))
        return nn.Dense(POINTS)(max_min(nn.Dense(128)(x)))


class Residual(nn.Module):
    """The usual step: the state, and a change."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + Network()(x)


class Average(nn.Module):
    """The average of the state and what a network makes of it; of nothing it makes nothing."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        network = Network()
        return (x + network(x) - network(jnp.zeros_like(x))) / 2


NormalizedAverage = jsn.linen.spectral_norm(Average, bound=0.99999)


def prove(model: nn.Module, params: Any) -> float:
    """A proven Lipschitz constant of one step."""
    return jsn.lipschitz_bound(partial(model.apply, {"params": params}), jnp.ones((1, POINTS)))


# --8<-- [end:model]

MODELS = {  # what is trained, with how much noise, and what is rolled out with the result
    "residual": (Residual(), 0.0, Residual()),
    "residual, noise": (Residual(), 0.05, Residual()),
    "average": (Average(), 0.0, Average()),
    "average, jsn": (NormalizedAverage(), 0.0, Average()),
}
COLORS = dict(zip(MODELS, (ORANGE, PINK, GREEN, BLUE), strict=True))


def advance(x: jax.Array, growth: float) -> jax.Array:
    """The true step, as eight small explicit ones."""
    for _ in range(8):
        slope = jnp.roll(x, -1, axis=-1) - x
        flux = slope / jnp.sqrt(1 + (4 * slope) ** 2)
        x += (flux - jnp.roll(flux, 1, axis=-1) + growth * (x - x**3)) / 8
    return x


def profiles(key: jax.Array, n: int) -> jax.Array:
    """Random smooth temperatures around the ring: a mean and six waves."""
    k, place = jnp.arange(7)[:, None], 2 * jnp.pi * jnp.arange(POINTS)[None] / POINTS
    waves = jnp.concatenate([jnp.cos(k * place), jnp.sin(k * place)]) / jnp.tile(1 + k, (2, 1))
    return jax.random.normal(key, (n, 14)) @ waves / 2


def measurements(key: jax.Array, growth: float) -> tuple[jax.Array, jax.Array]:
    """States, and those one step later, of a few trajectories, all with the noise of a sensor."""
    start_key, noise_key = jax.random.split(key)
    step = lambda x, _: (advance(x, growth), x)
    states = jax.lax.scan(step, profiles(start_key, N_TRAJECTORIES), length=50)[1]
    states += NOISE * jax.random.normal(noise_key, states.shape)
    return states[:-1].reshape(-1, POINTS), states[1:].reshape(-1, POINTS)


@partial(jax.jit, static_argnames=("name", "steps"))
def train(name: str, steps: int, growth: float, key: jax.Array) -> Any:
    """Learns one step by least squares; the parameters as the network uses them come back."""
    model, noise, _ = MODELS[name]
    data_key, init_key, run_key = jax.random.split(key, 3)
    before, after = measurements(data_key, growth)
    variables = model.init(init_key, before[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        variables, opt_state = carry
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH,), 0, len(before))
        x = before[rows] + noise * jax.random.normal(noise_key, (BATCH, POINTS))

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            y, new = model.apply({**variables, "params": params}, x, mutable=["sn_state"])
            return ((y - after[rows]) ** 2).sum(-1).mean(), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    carry = (variables, optimizer.init(variables["params"]))
    variables = jax.lax.scan(step, carry, jax.random.split(run_key, steps))[0][0]
    if "sn_state" not in variables:
        return variables["params"]
    return jsn.fold(variables["params"], variables["sn_state"], bound=0.99999)


@partial(jax.jit, static_argnames=("model", "steps"))
def roll_out(
    model: nn.Module, params: Any, x: jax.Array, steps: int, growth: float
) -> dict[str, jax.Array]:
    """After each step: the largest growth of a state, the error, and that of predicting zero."""

    def step(states: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
        learned, true = model.apply({"params": params}, states[0]), advance(states[1], growth)
        rms = lambda x: jnp.sqrt((x**2).mean())
        norm = partial(jnp.linalg.norm, axis=-1)
        found = {"grown": (norm(learned) / norm(x)).max(), "error": rms(learned - true)}
        return (learned, true), {**found, "zero": rms(true)}

    return jax.lax.scan(step, (x, x), length=steps)[1]


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    equations, names, seeds = EQUATIONS, list(MODELS), [0, 1, 2]
    steps, length = 1500, SHOWN[-1]
    if smoke:
        equations, names, seeds, steps, length = {"diffusion": 0.0}, ["average, jsn"], [0], 50, 100
    kept = np.union1d(np.geomspace(1, length, 80).astype(int), [s for s in SHOWN if s <= length])
    x, rows = profiles(jax.random.key(99), 64), []
    task = progress.add_task("simulators", total=len(equations) * len(names) * len(seeds))
    for equation, growth in equations.items():
        for name in names:
            found = []
            for seed in seeds:
                params = train(name, steps, growth, jax.random.key(seed))
                curves = jax.device_get(roll_out(MODELS[name][2], params, x, length, growth))
                finite = {key: np.where(np.isfinite(c), c, np.nan) for key, c in curves.items()}
                thinned = {key: curve[kept - 1] for key, curve in finite.items()}
                found.append({"bound": prove(MODELS[name][2], params), **thinned})
                progress.advance(task)
            row = {key: [one[key] for one in found] for key in found[0]}
            row["zero"] = row["zero"][0]  # the same for all
            rows.append({"equation": equation, "model": name, **row})
    return {"seeds": seeds, "steps": steps, "kept": kept, "rows": rows}


def at(result: dict[str, Any], row: dict[str, Any], what: str, step: int) -> np.ndarray:
    """A curve's values at one step, by seed."""
    return np.array(row[what], float)[..., list(result["kept"]).index(step)]


def check(result: dict[str, Any]) -> None:
    cells = {(row["equation"], row["model"]): row for row in result["rows"]}
    for (_, name), row in cells.items():
        if "jsn" in name:
            assert np.max(row["bound"]) <= 1, f"jsn: the constant of a step is {row['bound']}"
            assert np.max(row["grown"]) <= 1, "jsn: a state has grown"
    if len(cells) > 1:  # the full run
        values = lambda equation, name, *what: at(result, cells[equation, name], *what)
        grown = np.nan_to_num(values("diffusion", "residual", "grown", 1000), nan=np.inf)
        assert (grown > 1e6).all(), "residual: it has not blown up"
        errors = [values("diffusion", name, "error", 1) for name in ("average, jsn", "residual")]
        assert np.median(errors[0]) < np.median(errors[1]), "jsn: no better where it fits"


def parts(result: dict[str, Any]) -> dict[str, str]:
    shown = [step for step in SHOWN if step in result["kept"]]
    head = ["", "step 1", *map(str, shown[1:])]
    zero = lambda row: ["zero", *[f"{at(result, row, 'zero', step):.3g}" for step in shown]]
    texts: dict[str, str] = {}
    for equation in dict.fromkeys(row["equation"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["equation"] == equation]
        cells = lambda row, what: [spread(at(result, row, what, step)) for step in shown]
        errors = [[row["model"], *cells(row, "error")] for row in rows]
        texts[f"{equation}: error"] = table(head, [*errors, zero(rows[0])])
        grown = [[row["model"], spread(row["bound"], ".6g"), *cells(row, "grown")] for row in rows]
        texts[f"{equation}: grown"] = table(["", "proven constant of a step", *head[1:]], grown)
        if equation == "diffusion":
            last = "; ".join(f"{name} {cells[-1]}" for name, *cells in grown)
            texts["headline"] = f"The largest state after {shown[-1]} steps, 1 at first: {last}."
    return texts


def draw(result: dict[str, Any], figure: Any) -> None:
    panels = figure.subplots(1, 3)
    kept = result["kept"]
    shown = [
        ("diffusion", "grown", "diffusion: size"),
        ("diffusion", "error", "diffusion: error"),
        ("diffusion and growth", "error", "diffusion and growth: error"),
    ]
    for axes, (equation, what, title) in zip(panels, shown, strict=True):
        for row in result["rows"]:
            if row["equation"] == equation:
                lines(axes, kept, row[what], row["model"], color=COLORS[row["model"]])
                if what == "error":
                    axes.plot(kept, row["zero"], color=GREY, lw=0.8, ls=":")
        axes.set(xscale="log", yscale="log", xlabel="step")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    panels[0].set(ylim=(0.05, 1e4), ylabel="largest |state|, 1 at the start")
    panels[0].axhline(1, color=GREY, lw=0.8)
    panels[1].set(ylim=(5e-3, 1e2), ylabel="error (dotted: that of predicting zero)")
    panels[2].set(ylim=(5e-3, 1e2))
    panels[0].legend(fontsize=8, loc="upper left")


if __name__ == "__main__":
    main("learned_physics", __doc__, measure=measure, check=check, parts=parts, draw=draw)
