"""SNGP: a network that knows how far from its training data it is, on digits against letters.

    python examples/uncertainty.py [--smoke]

A residual trunk whose branches have norm at most 0.95 cannot map two distant pictures to the same
features, so a Gaussian process on top of it can tell what is far from everything it has seen.
Trunks with and without the bound, heads with and without the Gaussian process: how far apart are
digits from letters and noise, and what do they say of points ever further away?

References:
    Liu et al. 2020, Simple and Principled Uncertainty Estimation with Deterministic Deep Learning
    via Distance Awareness, https://arxiv.org/abs/2006.10108
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gallery import BLUE, GREY, ORANGE, lines, main, spread
from _letters import letters
from _sngp import BOUND, KINDS, fit_and_predict
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from sklearn.datasets import load_digits, make_moons
from sklearn.metrics import roc_auc_score

from benchmarks._report import table

SETS = ("letters", "shuffled", "negatives", "noise")
SCALES = (2.0, 4.0, 8.0, 16.0)
DISTANCES = np.linspace(0, 10, 21)
MOONS = (np.linspace(-2.5, 3.5, 61), np.linspace(-2, 2.5, 46))


def measure(smoke: bool, progress: Any) -> dict[str, Any]:
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.data))
    x, y = (digits.data / 16)[order], digits.target[order]
    data, held, labels = (jnp.asarray(x[:1350]), jnp.asarray(y[:1350])), x[1350:], y[1350:]
    away = rng.standard_normal(held.shape)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    sets = {
        "digits": held,
        "letters": letters(),
        "shuffled": rng.permuted(held, axis=1),
        "negatives": 1 - held,
        "noise": rng.uniform(size=held.shape),
        **{f"moved by {t}": held + t * away for t in DISTANCES[1:]},
    }
    pool = np.concatenate(list(sets.values()))
    which = np.repeat(list(sets), [len(images) for images in sets.values()])
    nearest = cdist(pool, x[:1350]).min(axis=1)
    pairs = rng.integers(0, len(pool), (2, 50_000))
    apart = lambda x: np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=1)
    pairs = pairs[:, apart(pool) > 0.1]

    seeds, steps, depth = list(range(1 if smoke else 3)), 150 if smoke else 800, 2 if smoke else 12
    cases = [(kind, s) for kind in KINDS for s in (SCALES if "Gaussian" in kind else SCALES[:1])]
    cases = [("jsn, Gaussian process", 4.0)] if smoke else cases
    rows = []
    task = progress.add_task("digits", total=len(cases) * len(seeds))
    for kind, scale in cases:
        model, found = KINDS[kind].clone(trunk=KINDS[kind].trunk.clone(depth=depth)), []
        for seed in seeds:
            done = fit_and_predict(model, steps, data, scale, pool, jax.random.key(seed))
            probabilities, features, params = jax.tree.map(np.asarray, done)
            surest = probabilities.max(axis=1)
            told = probabilities[which == "digits"]
            stretch = apart(features) / apart(pool)
            moved = [name for name in sets if name not in SETS]
            kernels = [layer["kernel"].astype(np.float64) for layer in params.values()]
            found.append(
                {
                    "accuracy": np.mean(told.argmax(axis=1) == labels),
                    "loss": -np.log(told[np.arange(len(labels)), labels]).mean(),
                    **{name: auroc(surest, which, name) for name in SETS},
                    "rank": spearmanr(nearest, -surest)[0],
                    "least": stretch.min(),
                    "most": stretch.max(),
                    "norm": max(np.linalg.norm(kernel, 2) for kernel in kernels),
                    "curve": [surest[which == name].mean() for name in moved],
                }
            )
            progress.advance(task)
        rows.append({"model": kind, "scale": scale, **{k: [f[k] for f in found] for k in found[0]}})
    result = {"depth": depth, "seeds": seeds, "steps": steps, "rows": rows}
    return result if smoke else {**result, "moons": moons(progress)}


def auroc(surest: np.ndarray, which: np.ndarray, name: str) -> float:
    """How well "less sure" tells pictures of this set from digits: 1 is always, 0.5 is a guess."""
    rows = np.isin(which, ["digits", name])
    return roc_auc_score(which[rows] == name, -surest[rows])


def moons(progress: Any) -> list[dict[str, Any]]:
    """The same four networks in two dimensions, where all of it can be seen."""
    x, y = (jnp.asarray(a) for a in make_moons(400, noise=0.1, random_state=0))
    grid = np.stack(np.meshgrid(*MOONS), axis=-1)
    rows = []
    for kind, model in progress.track(KINDS.items(), description="two moons"):
        key, model = jax.random.key(0), model.clone(classes=2)
        done = fit_and_predict(model, 500, (x, y), 1.0, jnp.asarray(grid.reshape(-1, 2)), key)
        surest = np.asarray(done[0]).max(axis=1).reshape(grid.shape[:2])
        rows.append({"model": kind, "surest": surest.round(2).tolist()})
    return rows


def check(result: dict[str, Any]) -> None:
    depth, full = result["depth"], len(result["rows"]) > 1
    for row in result["rows"]:
        values = {key: np.array(value, float) for key, value in row.items() if key != "model"}
        if row["model"].startswith("jsn"):
            assert (values["norm"] <= BOUND * 1.005).all(), "jsn: more than the bound"
            assert (values["least"] >= (1 - BOUND) ** depth).all(), "distances collapse"
            assert (values["most"] <= (1 + BOUND) ** depth).all(), "distances explode"
        if row["model"] == "jsn, Gaussian process":
            assert (values["accuracy"] > (0.9 if full else 0.8)).all(), (
                "jsn: has not learned the digits"
            )
            assert (values["letters"] > 0.85).all(), "jsn: takes letters for digits"
            assert (values["curve"][:, -1] < 0.5).all(), "jsn: sure of what is far away"
        if full and row["model"].endswith("softmax"):
            assert (values["curve"][:, -1] > 0.7).all(), f"{row['model']}: unsure far away"


def parts(result: dict[str, Any]) -> dict[str, str]:
    rows = result["rows"]
    last = {row["model"]: row for row in rows}  # at the largest length scale
    processes = [row for row in rows if row["model"].endswith("process")]
    shown = lambda row, *names: [spread(row[name]) for name in names]
    terms = ("loss", "letters", "rank")
    percent = lambda row: spread(row["accuracy"], ".1f", 100)
    unsure = "; ".join(f"{kind} {spread(last[kind]['letters'])}" for kind in KINDS if kind in last)
    return {
        "headline": f"Area under the curve, letters against digits by confidence: {unsure}.",
        "sets": table(
            ["", "accuracy, %", *SETS, "rank correlation with distance"],
            [
                [kind, percent(last[kind]), *shown(last[kind], *SETS, "rank")]
                for kind in KINDS
                if kind in last
            ],
        ),
        "scales": table(
            ["", "length scale", "accuracy, %", "loss", "letters", "rank correlation"],
            [
                [row["model"], f"{row['scale']:g}", percent(row), *shown(row, *terms)]
                for row in processes
            ],
        ),
        "distances": table(
            ["", "largest norm of a layer", "least stretch", "largest stretch"],
            [[kind, *shown(last[kind], "norm", "least", "most")] for kind in KINDS if kind in last],
        ),
    }


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    for axes, row in zip(left.subplots(2, 2).flat, result.get("moons", []), strict=False):
        axes.pcolormesh(*MOONS, row["surest"], vmin=0.5, vmax=1, cmap="Blues", rasterized=True)
        points, labels = make_moons(400, noise=0.1, random_state=0)
        axes.scatter(*points.T, c=np.where(labels, ORANGE, "black"), s=1)
        axes.set_title(row["model"], fontsize=9)
        axes.set(xticks=[], yticks=[], aspect="equal")
    left.suptitle("Two moons, length scale 1: white 50 % sure, blue 100 %", fontsize=10)
    axes = right.subplots()
    for kind, row in {row["model"]: row for row in result["rows"]}.items():
        color = BLUE if kind.startswith("jsn") else ORANGE
        dashes = "--" if kind.endswith("softmax") else "-"
        lines(axes, DISTANCES, row["curve"], kind, color=color, ls=dashes)
    axes.axhline(0.1, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="digits moved by a distance, in a random direction", ylim=(0, 1.02))
    axes.set_ylabel("mean confidence")
    axes.set_title("Away from the digits, length scale 16", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    main("uncertainty", __doc__, measure=measure, check=check, parts=parts, draw=draw)
