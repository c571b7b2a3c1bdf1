"""The page of `truth`: tables between markers of `docs/which.md`, and `docs/img/truth.png`.

In: stored rows. Out: the same numbers for reading. Must not know how they were measured.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _report
from benchmarks.truth import BLOCKS, SHAPES

TITLES = {
    "digits": "ten digits",
    "digits_20": "ten digits, logits × 20",
    "codes": "a hundred real codes",
    "autoencoder": "autoencoder",
    "critic": "convolutional critic",
    "teacher": "random teacher",
}
NETWORKS = {
    "digits": "512-512-512-10",
    "codes": "512-512-512-100",
    "autoencoder": "512-512-512-64",
    "critic": "4 convolutions",
}
TARGETS = dict.fromkeys(TITLES, 0.01) | {"teacher": 0.02}
"""By how much the worst layer may exceed 1, at any time, at the default block size."""
NO_COST = (
    "Not measured yet: `python -m benchmarks truth --only cost` on a quiet machine fills this in."
)
PICTURE = """![Six tasks. For each: by how much the worst layer's norm is above 1, against the time
that normalizing takes, for jsn, plain subspace iteration, and Flax.](img/truth.png)

Each point is one setting: its height is the worst moment of three runs, the pale stripe reaches
down to the median, the ring is the default. Lower is truer, further left is cheaper, the dark line
is what the default is asked for. Blue is the step that jsn takes, orange plain subspace iteration
with the same block, grey Flax's own `nn.SpectralNorm`."""
FORMS = ("flax", "subspace", "lobpcg", "thirds")

Key = tuple[str, str, int]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def write(result: dict[str, Any], folder: Path) -> None:
    """Writes page and picture below a folder, and prints the tables."""
    import jsn

    default = inspect.signature(jsn.init).parameters["block_size"].default
    typical, worst = _over_seeds(result)
    tables = {
        "default": _default_table(typical, worst, result, default),
        "smallest": _smallest_table(worst),
        "truth": _truth_table(typical, worst),
    }
    if "cost" in result:
        tables["cost"] = _cost_table(result)
    parts = {"cost": NO_COST, "picture": PICTURE if "cost" in result else NO_COST}
    parts |= {name: _report.table(*table) for name, table in tables.items()}
    parts["made"] = _made(result)
    real = folder == _report.ROOT
    docs = folder / "docs" if real else folder
    _report.write_parts(docs / "which.md", "truth", parts, _report.ROOT / "docs/which.md")
    written = [docs / "which.md"]
    if "cost" in result:
        written.append(docs / "img" / "truth.png")
        _draw(typical, worst, _costs(result), default, written[-1])
    for name, table in tables.items():
        _print(name, *table)
    print(*written, sep="\n")


def _over_seeds(result: dict[str, Any]) -> tuple[dict[Key, float], dict[Key, float]]:
    """Excess over 1 of the worst layer: the median seed's median, the worst seed's maximum."""
    medians: dict[Key, list[float]] = {}
    maxima: dict[Key, list[float]] = {}
    for row in result["truth"]["rows"]:
        key = row["task"], row["form"], row["size"]
        medians.setdefault(key, []).append(row["median"] - 1)
        maxima.setdefault(key, []).append(row["max"] - 1)
    typical = {key: statistics.median(values) for key, values in medians.items()}
    return typical, {key: max(values) for key, values in maxima.items()}


def _costs(result: dict[str, Any]) -> dict[Key, float]:
    timed = {
        (row["task"], row["form"], row["size"]): row["time_ratio"] for row in result["cost"]["rows"]
    }
    same = {
        (task, form, size): ratio
        for task, other in SHAPES.items()
        for (name, form, size), ratio in timed.items()
        if name == other
    }
    return timed | same


# --- tables -----------------------------------------------------------------------------------


def _percent(excess: float) -> str:
    digits = 3 if abs(excess) < 0.0095 else 2 if abs(excess) < 0.0995 else 1
    return f"{100 * excess:.{digits}f}"


def _default_table(
    typical: dict[Key, float], worst: dict[Key, float], result: dict[str, Any], default: int
) -> Table:
    seeds = sorted({row["seed"] for row in result["truth"]["rows"]})
    maxima = {
        (row["task"], row["form"], row["size"], row["seed"]): row["max"] - 1
        for row in result["truth"]["rows"]
    }
    head = ("task", "median", *(f"maximum, seed {seed}" for seed in seeds), "asked for", "")
    head = (*head, "Flax: median", "maximum")
    rows = []
    for task in _tasks(worst):
        key, flax = (task, "lobpcg", default), (task, "flax", 1)
        if key in worst:
            each = [_percent(maxima[*key, seed]) for seed in seeds]
            met = "met" if worst[key] <= TARGETS[task] else "**missed**"
            asked = f"≤ {100 * TARGETS[task]:.0f}"
            row = (TITLES[task], _percent(typical[key]), *each, asked, met)
            rows.append((*row, _percent(typical[flax]), _percent(worst[flax])))
    return head, rows


def _smallest_table(worst: dict[Key, float]) -> Table:
    limits = (0.05, 0.02, 0.01, 0.005)
    head = ("task", *(f"≤ {100 * limit:g} %" for limit in limits))
    cell = lambda task, limit: " / ".join(
        _smallest(worst, task, form, limit) for form in ("lobpcg", "subspace")
    )
    return head, [(TITLES[task], *(cell(task, t) for t in limits)) for task in _tasks(worst)]


def _smallest(worst: dict[Key, float], task: str, form: str, limit: float) -> str:
    """The smallest block within a limit; what was not measured is not claimed."""
    excess = {size: x for (name, kind, size), x in worst.items() if (name, kind) == (task, form)}
    if (one := (task, "lobpcg", 1)) in worst:
        excess[1] = worst[one]  # one vector is the same in all forms
    if not excess:
        return "?"
    within = [n for n in excess if all(x <= limit for m, x in excess.items() if m >= n)]
    if not within:
        return f"> {max(excess)}"
    best = min(within)
    tried = max((n for n in excess if n < best), default=0)
    return f"≤ {best}" if any(tried < n < best for n in BLOCKS) else f"{best}"


def _truth_table(typical: dict[Key, float], worst: dict[Key, float]) -> Table:
    tasks = _tasks(worst)
    rows = []
    for form, size in _methods(worst):
        keys = [(task, form, size) for task in tasks]
        cells = (
            f"{_percent(typical[k])} / {_percent(worst[k])}" if k in worst else "" for k in keys
        )
        rows.append((_name(form, size), *cells))
    return ("", *(TITLES[task] for task in tasks)), rows


def _cost_table(result: dict[str, Any]) -> Table:
    found = {(row["task"], row["form"], row["size"]): row for row in result["cost"]["rows"]}
    tasks = [task for task in NETWORKS if any(key[0] == task for key in found)]
    rows = []
    for form, size in _methods(found):
        at = [found[task, form, size] for task in tasks]
        cells = (f"{row['time_ratio']:.2f} / {row['bytes_ratio']:.2f}" for row in at)
        rows.append((_name(form, size), *cells))
    one = [f"{found[task, 'flax', 1]['ms_undisturbed']:.2f}" for task in tasks]
    return ("", *(NETWORKS[task] for task in tasks)), [*rows, ("Flax, 1 step, ms", *one)]


def _tasks(found: Iterable[Key]) -> list[str]:
    there = {task for task, _, _ in found}
    return [task for task in TITLES if task in there]


def _methods(found: Iterable[Key]) -> list[tuple[str, int]]:
    there = {(form, size) for _, form, size in found}
    return sorted(there, key=lambda method: (FORMS.index(method[0]), method[1]))


def _name(form: str, size: int) -> str:
    if form == "flax":
        return f"Flax, {size} {'step' if size == 1 else 'steps'}"
    kind = {"thirds": "lobpcg, in thirds,"}.get(form, form)
    return "one vector" if size == 1 else f"{kind} {size}"


def _made(result: dict[str, Any]) -> str:
    lines = []
    for part, what in (("truth", "Norms"), ("cost", "Cost")):
        if part not in result:
            continue
        made = result[part]["made"]
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        lines.append(
            f"{what}: measured {made['date'][:10]} with jsn {made['jsn']} on {made['cpu']}, one "
            f"thread for each process, load {made['load_before']} on {made['cores']} cores before "
            f"it began; {versions}."
        )
    return "\n\n".join(lines)


def _print(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(title=name, title_justify="left")
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 140)).print(table)


# --- picture ----------------------------------------------------------------------------------

# Okabe and Ito's palette: distinct for every kind of colour vision, and in grey.
LOOKS = {
    "flax": {"color": "#6b6b6b", "marker": "s", "linestyle": (0, (1, 1.5)), "markersize": 4.5},
    "subspace": {"color": "#D55E00", "marker": "^", "linestyle": (0, (4, 2)), "markersize": 5.5},
    "lobpcg": {"color": "#0072B2", "marker": "o", "linestyle": "-", "markersize": 5},
}
LABELS = {
    "flax": "Flax's SpectralNorm, by power steps",
    "subspace": "plain subspace iteration, by block size",
    "lobpcg": "jsn, by block size",
}
FLOOR = 3e-6


def _draw(
    typical: dict[Key, float],
    worst: dict[Key, float],
    costs: dict[Key, float],
    default: int,
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = _tasks(worst)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    style = {"font.family": "sans-serif", "font.size": 9, "axes.edgecolor": "#9a9a9a"}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(3.55 * columns, 2.9 * rows + 0.9),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, task in zip(grid.flat, tasks, strict=False):
            _draw_task(axes, task, typical, worst, costs, default)
        for axes in grid.flat[len(tasks) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("worst layer's norm is above 1 by")
        for axes in grid[-1]:
            axes.set_xlabel("time of normalizing, Flax's one step = 1")
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(),
            loc="outside upper left",
            ncols=3,
            frameon=False,
            handlelength=2.8,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _draw_task(
    axes: Any,
    task: str,
    typical: dict[Key, float],
    worst: dict[Key, float],
    costs: dict[Key, float],
    default: int,
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for form in LOOKS:
        sizes = sorted(size for name, kind, size in worst if (name, kind) == (task, form))
        keys = [(task, form, size) for size in sizes]
        one = (task, "lobpcg", 1)
        if form == "subspace" and one in worst:
            keys = [one, *keys]  # one vector is the same in all forms
        x = [costs[key] for key in keys]
        top = [max(worst[key], FLOOR) for key in keys]
        usual = [max(typical[key], FLOOR) for key in keys]
        look = LOOKS[form]
        axes.plot(x, top, **look, label=LABELS[form], linewidth=1.6, zorder=3, clip_on=False)
        axes.vlines(x, usual, top, color=look["color"], linewidth=3.2, alpha=0.18, zorder=1)
        for key, left, up in zip(keys, x, top, strict=True):
            if key[1] == form:
                _label(axes, key, left, up, default)
    target = TARGETS[task]
    axes.axhline(target, color="#3a3a3a", linewidth=0.9, zorder=2)
    axes.annotate(
        f"{100 * target:.0f} %",
        (1, target),
        xycoords=("axes fraction", "data"),
        xytext=(-1, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color="#3a3a3a",
    )
    axes.set_title(TITLES[task], loc="left", fontsize=10, fontweight="bold")
    axes.set(xscale="log", yscale="log", ylim=(FLOOR, 1))
    axes.grid(color="#e9e9e9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 3, 4, 6, 8]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _label(axes: Any, key: Key, x: float, y: float, default: int) -> None:
    _, form, size = key
    chosen = (form, size) == ("lobpcg", default)
    if chosen:
        axes.plot(x, y, "o", ms=11, mfc="none", mec=LOOKS[form]["color"], mew=1.3, zorder=4)
    below = form == "lobpcg"
    axes.annotate(
        f"{size}",
        (x, y),
        xytext=(-4, -11 - 3 * chosen) if below else (4, 5),
        textcoords="offset points",
        ha="right" if below else "left",
        fontsize=8,
        fontweight="bold" if chosen else "normal",
        color=LOOKS[form]["color"],
        zorder=5,
    )
