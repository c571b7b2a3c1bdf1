"""The pictures of `speed`: `docs/img/speed_layers.png`, `speed_width.png`, `speed_uses.png`.

In: stored results. Out: how time grows, for reading. Must not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURES = {
    "layers": "![Trace plus compile time, and time of a call, against the number of layers, for "
    "layers of one shape and of all different shapes.](img/speed_layers.png)",
    "width": "![Time of normalizing one square weight against its width, as multiples of Flax's "
    "and in milliseconds.](img/speed_width.png)",
    "uses": "![Time that normalizing adds to a training step, against the number of forward passes "
    "in it.](img/speed_uses.png)",
}

# Okabe and Ito's palette: distinct for every kind of colour vision, and in grey.
LOOKS: dict[str, dict[str, Any]] = {
    "copy of the weights": {"color": "#9a9a9a", "marker": "", "linestyle": (0, (1, 1))},
    "no normalization": {"color": "#9a9a9a", "marker": "", "linestyle": (0, (1, 1))},
    "floor: one normalized, the rest scaled": {
        "color": "#CC79A7",
        "marker": "",
        "linestyle": (0, (1, 1)),
    },
    "Flax linen": {"color": "#3a3a3a", "marker": "s", "linestyle": (0, (1, 1.5))},
    "jsn, block 1": {"color": "#009E73", "marker": "v", "linestyle": (0, (2, 1))},
    "jsn, block 8": {"color": "#56B4E9", "marker": "D", "linestyle": (0, (4, 2))},
    "jsn, default": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "jsn, normalized once": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "jsn, decorator": {"color": "#D55E00", "marker": "^", "linestyle": (0, (4, 2))},
}

Line = tuple[str, Sequence[float], Sequence[float]]


def draw(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Draws what was measured, and returns its names."""
    drawn = [name for name in PICTURES if name in result]
    if not drawn:
        return drawn
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    painters = {"layers": _layers, "width": _width, "uses": _uses}
    for name in drawn:
        painters[name](result[name]["rows"], folder / f"speed_{name}.png")
    return drawn


def _layers(rows: list[dict[str, Any]], path: Path) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    panels = []
    for key, what in (("compile_s", "trace + compile, s"), ("ms_median", "time of a call, ms")):
        for kind in kinds:
            lines = _lines([row for row in rows if row["kind"] == kind], "layers", key)
            panels.append((kind, "layers", what, lines))
    _figure(panels, len(kinds), path, share_y="row")


def _width(rows: list[dict[str, Any]], path: Path) -> None:
    panels = [
        ("in milliseconds", "width of a square weight", "time, ms", _lines(rows, "width")),
        (
            "against Flax",
            "width of a square weight",
            "time, Flax's = 1",
            _lines(rows, "width", "ratio"),
        ),
    ]
    _figure(panels, 2, path)


def _uses(rows: list[dict[str, Any]], path: Path) -> None:
    """What a step takes longer than the same step without normalization."""
    plain = {row["uses"]: row for row in rows if row["name"] == "no normalization"}
    added = [
        row | {"added": (row["ratio"] - 1) * plain[row["uses"]]["ms_median"]}
        for row in rows
        if row["name"] != "no normalization"
    ]
    lines = _lines(added, "uses", "added")
    _figure(
        [("what normalizing adds", "forward passes in a step", "ms", lines)], 1, path, log=False
    )


def _lines(rows: Iterable[Mapping[str, Any]], x: str, y: str = "ms_median") -> list[Line]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        xs, ys = found.setdefault(row["name"], ([], []))
        xs.append(row[x])
        ys.append(row[y])
    return [(name, *found[name]) for name in LOOKS if name in found]


def _figure(
    panels: Sequence[tuple[str, str, str, list[Line]]],
    columns: int,
    path: Path,
    log: bool = True,
    share_y: Any = False,
) -> None:
    import matplotlib.pyplot as plt

    style: Any = {"font.family": "sans-serif", "font.size": 9, "axes.edgecolor": "#9a9a9a"}
    rows = -(-len(panels) // columns)
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(3.9 * columns + 0.6 * (columns == 1), 2.8 * rows + 0.6),
            squeeze=False,
            layout="constrained",
            sharey=share_y,
        )
        for axes, panel in zip(grid.flat, panels, strict=True):
            _panel(axes, *panel, log=log)
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(),
            loc="outside upper left",
            ncols=min(len(panels[0][3]), 2 * columns),
            frameon=False,
            handlelength=2.8,
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _panel(axes: Any, title: str, x: str, y: str, lines: list[Line], log: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    for name, xs, ys in lines:
        axes.plot(xs, ys, **LOOKS[name], label=name, linewidth=1.6, markersize=4.5)
    ticks = sorted({value for _, xs, _ in lines for value in xs})
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set(xlabel=x, ylabel=y, xscale="log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if _decades(lines) < 2 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=min(0.0, *(min(ys) for _, _, ys in lines)))
    axes.grid(color="#e9e9e9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _decades(lines: list[Line]) -> float:
    import math

    values = [y for _, _, ys in lines for y in ys if y > 0]
    return math.log10(max(values) / min(values)) if values else 0.0
