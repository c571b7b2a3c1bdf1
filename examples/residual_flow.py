"""Residual flows: networks that can be inverted, with densities that are exact in expectation.

    python examples/residual_flow.py [--smoke]

x + g(x) is invertible where g has a Lipschitz constant c below 1, and the iteration x <- y - g(x)
finds the inverse: each round leaves c of the error. Its log determinant is an infinite series;
stopped early it is biased, stopped at random and reweighted (Russian roulette) it is not. On
densities in the plane, which are known, and on digits; determinants are computed to compare.

References:
    Behrmann et al. 2019, Invertible Residual Networks, https://arxiv.org/abs/1811.00995.
    Chen et al. 2019, Residual Flows for Invertible Generative Modeling,
    https://arxiv.org/abs/1906.02735: equations 6 (estimator) and 8 (its gradient), LipSwish.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _flow import KEEP, ROUNDS, backward, block, exact_block, forward, inversion, prove, train
from _gallery import BLUE, GREEN, GREY, ORANGE, PINK, lines, main, spread
from sklearn.datasets import load_digits

from benchmarks._report import table

CONSTANTS = {0.5: PINK, 0.7: GREEN, 0.9: ORANGE, 0.97: BLUE}
SMALL = 1e-4  # of the first error: rounding keeps inversion from getting much further in float32

# Known densities in the plane: how to draw from them, and their logarithm.
CENTRES = 2 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], -1)


def eight(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight Gaussians of width 0.2 on a circle."""
    x = CENTRES[rng.integers(8, size=n)] + 0.2 * rng.normal(size=(n, 2))
    squares = ((x[:, None] - CENTRES) ** 2).sum(-1) / 0.2**2
    return x, np.log(np.exp(-0.5 * squares).mean(-1) / (2 * np.pi * 0.2**2))


def checkerboard(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The eight black squares of a board of four by four."""
    row, column = rng.integers(4, size=n), rng.integers(2, size=n)
    corner = np.stack([row, 2 * column + row % 2], -1) - 2
    return corner + rng.random((n, 2)), np.full(n, -np.log(8))


def pictures(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Digits as numbers without bounds, and what log2 density and bits per pixel differ by."""
    pixels = (load_digits().data + rng.random((1797, 64))) / 17
    inner = 0.05 + 0.9 * pixels
    x = np.log(inner / (1 - inner))
    volume = np.log(0.9 / (inner * (1 - inner))).sum(-1) - 64 * np.log(17)
    return x / 2, volume + 64 * np.log(0.5)


def as_pictures(x: np.ndarray) -> np.ndarray:
    return np.clip((1 / (1 + np.exp(-2 * x)) - 0.05) / 0.9, 0, 1)


@jax.jit
def examine(blocks: Any, x: jax.Array) -> dict[str, jax.Array]:
    """Exact log densities, what estimates are off by, and what inversion leaves."""
    keys = jax.random.split(jax.random.key(1), 32)
    z, exact = forward(exact_block, blocks, x, keys[0])
    off = lambda keep: jax.lax.map(
        lambda key: forward(block, blocks, x, key, keep)[1].mean() - exact.mean(), keys
    )
    return {
        "log_density": exact,
        "roulette": off(KEEP),
        "stopped": off(0.0),
        "inversion": inversion(blocks, x),
        "round_trip": jnp.abs(backward(blocks, z) - x).max(),
    }


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    runs = [(eight, c, KEEP) for c in CONSTANTS] + [(eight, 0.97, 0.0), (checkerboard, 0.97, KEEP)]
    seeds, steps, n_points = [0, 1, 2], 400, 1000
    if smoke:
        runs, seeds, steps, n_points = [(eight, 0.7, KEEP)], [0], 10, 100
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    fit = jax.jit(jax.vmap(train, (None, None, None, None, 0)), static_argnums=3)
    of = lambda trees, i: jax.tree.map(lambda leaf: leaf[i], trees)
    rows, samples = [], {}
    for density, c, keep in progress.track(runs, description="densities in the plane"):
        data = density(np.random.default_rng(0), 20000)[0]
        x, truth = density(np.random.default_rng(1), n_points)
        trained = fit(jnp.asarray(data, jnp.float32), c, keep, steps, keys)
        row: dict[str, Any] = {"density": density.__name__, "c": c, "keep": keep}
        found = []
        for i in range(len(seeds)):
            one = jax.device_get(examine(of(trained, i), jnp.asarray(x, jnp.float32)))
            one["divergence"] = float((truth - one.pop("log_density")).mean())
            found.append({**one, "constant": prove(of(trained, i))})
        normal = jax.random.normal(jax.random.key(2), (600, 2))
        samples[f"{row['density']} {c} {keep}"] = backward(of(trained, 0), normal).round(2)
        covariance = np.linalg.slogdet(2 * np.pi * np.e * np.cov(data.T))[1] / 2
        row["gaussian"] = float(truth.mean() + covariance)
        rows.append({**row, **{key: [one[key] for one in found] for key in found[0]}})
    result = {"seeds": seeds, "steps": steps, "rows": rows, "samples": samples}
    return result if smoke else {**result, "digits": digits(fit, keys[:2], steps, of)}


def digits(fit: Any, keys: jax.Array, steps: int, of: Any) -> dict[str, Any]:
    """Bits per pixel of held-out digits: exactly, as estimated, and by a Gaussian."""
    x, volume = pictures(np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(len(x))
    train_x, test_x, volume = x[order[:1400]], x[order[1400:1600]], volume[order[1400:1600]]
    bits = lambda log_density: float(-np.mean(log_density + volume) / (64 * np.log(2)))
    trained = fit(jnp.asarray(train_x, jnp.float32), 0.97, KEEP, steps, keys)
    found = []
    for i in range(len(keys)):
        one = jax.device_get(examine(of(trained, i), jnp.asarray(test_x, jnp.float32)))
        one["bits"] = bits(one.pop("log_density"))
        found.append({**one, "constant": prove(of(trained, i))})
    mean, covariance = train_x.mean(0), np.cov(train_x.T)
    off = test_x - mean
    squares = (off * np.linalg.solve(covariance, off.T).T).sum(-1)
    gaussian = -0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])
    z = 0.8 * jax.random.normal(jax.random.key(3), (16, 64))  # a little below 1, as is customary
    drawn = as_pictures(np.asarray(backward(of(trained, 0), z))).round(2)
    shown = as_pictures(test_x[:16]).round(2)
    row = {key: [one[key] for one in found] for key in found[0]}
    return {**row, "gaussian": bits(gaussian), "drawn": drawn, "real": shown}


def check(result: dict[str, Any]) -> None:
    for row in [*result["rows"], *([result["digits"]] if "digits" in result else [])]:
        assert np.max(row["round_trip"]) < 1e-3, "a flow is not inverted"
        if "c" in row:
            theory = np.array(row["constant"])[:, None] ** np.arange(ROUNDS)
            assert np.max(row["constant"]) < row["c"] * 1.0001, "a branch is above its constant"
            assert (np.array(row["inversion"]) <= theory + 1e-4).all(), "slower than the theory"
        errors = np.array(row["roulette"])
        standard = errors.std(-1) / np.sqrt(errors.shape[-1])
        assert (np.abs(errors.mean(-1)) < 5 * standard + 1e-4).all(), "roulette is biased"
    if len(result["rows"]) > 1:  # the full run
        strict, *_, loose = [row for row in result["rows"] if row["density"] == "eight"][:4]
        assert np.median(loose["divergence"]) < np.median(strict["divergence"])
        assert np.median(loose["divergence"]) < 0.5 * loose["gaussian"], "no better than a Gaussian"


def rounds(row: dict[str, Any]) -> list[int]:
    """How many rounds leave less than SMALL of the error, by seed."""
    return [int(np.argmax(np.array(curve) < SMALL)) for curve in row["inversion"]]


def parts(result: dict[str, Any]) -> dict[str, str]:
    mean = lambda row, what: spread(np.mean(row[what], -1), ".2g")
    error = lambda row, what: f"{np.std(row[what]) / np.sqrt(np.size(row[what])):.1g}"
    plane = [
        [
            f"{row['density']}, c = {row['c']}" + ("" if row["keep"] else ", trained on 3 terms"),
            f"{row['gaussian']:.3g}",
            spread(row["divergence"]),
            spread(rounds(row), ".0f"),
            f"{np.log(SMALL) / np.log(row['c']):.0f}",
            mean(row, "stopped"),
            f"{mean(row, 'roulette')}, ± {error(row, 'roulette')}",
        ]
        for row in result["rows"]
    ]
    head = ["", "a Gaussian", "flow", "rounds", "theory", "3 terms", "roulette"]
    texts = {"plane": table(head, plane)}
    last = result["rows"][min(3, len(result["rows"]) - 1)]
    nats = f"one Gaussian {last['gaussian']:.3g}, a flow {spread(last['divergence'])}"
    found = f"its blocks, of c = {last['c']}, are inverted in {spread(rounds(last), '.0f')} rounds"
    texts["headline"] = f"Nats that are lost on eight Gaussians: {nats}; {found}."
    if "digits" in result:
        row = result["digits"]
        cells = [spread(row["bits"]), f"{row['gaussian']:.3g}", f"{np.log2(17):.3g}"]
        trip = spread(row["round_trip"], ".1g")
        nats = [f"{mean(row, what)}, ± {error(row, what)}" for what in ("stopped", "roulette")]
        head = ["flow", "a Gaussian", "uniform", "3 terms, nats", "roulette, nats", "round trip"]
        texts["digits"] = table(["", *head], [["digits", *cells, *nats, trip]])
    return texts


def draw(result: dict[str, Any], figure: Any) -> None:
    grid = figure.add_gridspec(2, 4, width_ratios=[2.4, 1, 1, 1])
    left = figure.add_subplot(grid[:, 0])
    for row in result["rows"]:
        if row["density"] == "eight" and row["keep"]:
            color, steps = CONSTANTS[row["c"]], np.arange(ROUNDS)
            lines(left, steps, row["inversion"], f"c = {row['c']}", color=color)
            left.plot(steps, row["c"] ** steps, color=color, ls=":", lw=1)
    left.set(yscale="log", ylim=(1e-7, 1.5), xlim=(0, ROUNDS - 1), xlabel="rounds")
    left.set(ylabel="error left, worst block and point", title="Inversion (dotted: theory)")
    left.legend(fontsize=8, loc="upper right")
    left.grid(alpha=0.25)
    for column, density in enumerate((eight, checkerboard), 1):
        names = [name for name in result["samples"] if name.startswith(density.__name__)]
        if names:
            best = next(name for name in reversed(names) if not name.endswith(" 0.0"))
            true = density(np.random.default_rng(2), 600)[0]
            for line, (points, title, color) in enumerate(
                [(true, "data", GREY), (np.array(result["samples"][best]), "flow", BLUE)]
            ):
                axes = figure.add_subplot(grid[line, column])
                axes.scatter(*points.T, s=1, color=color)
                axes.set(xticks=[], yticks=[], xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
                axes.set_title(f"{density.__name__}: {title}", fontsize=9)
    if "digits" in result:
        for line, what in enumerate(("real", "drawn")):
            axes = figure.add_subplot(grid[line, 3])
            tiles = np.array(result["digits"][what]).reshape(4, 4, 8, 8)
            axes.imshow(tiles.transpose(0, 2, 1, 3).reshape(32, 32), cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"digits: {'data' if what == 'real' else 'flow'}", fontsize=9)


if __name__ == "__main__":
    main("residual_flow", __doc__, measure=measure, check=check, parts=parts, draw=draw)
