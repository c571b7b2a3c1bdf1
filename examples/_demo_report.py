"""What the demo shows: a progress bar, a table, and three pictures.

In: finished runs. Out: text on the terminal and PNG files. Must not know how they were trained.
"""

import sys
from collections.abc import Mapping, Sequence
from math import nan, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _demo_judge import N_CLASSES, Digits, Scores
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# Okabe and Ito's colour-blind safe palette; line styles tell the runs apart in grey as well.
STYLES: Mapping[str, Mapping[str, Any]] = {
    "plain": {"color": "#D55E00", "linestyle": "--", "label": "plain critic"},
    "jsn": {"color": "#0072B2", "linestyle": "-", "label": "critic with jsn"},
}
REAL_STYLE = {"color": "#555555", "linestyle": ":", "label": "real digits, held out"}
GRID_ROWS = 8


class Checkpoint(NamedTuple):
    """A look at a run: the critic's mean loss since the last look, and what holds at `step`."""

    step: int
    critic_loss: float
    norms: dict[str, float]
    scores: Scores


class Run(NamedTuple):
    """A finished run: `name` is a key of `STYLES`, `samples` are its last pictures."""

    name: str
    checkpoints: list[Checkpoint]
    samples: Digits
    seconds: float

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]

    def over_time(self, quantity: str) -> NDArray[np.float64]:
        """One number for each checkpoint: `critic_loss`, `frechet`, `accuracy` or a layer."""
        return np.array([_look_up(point, quantity) for point in self.checkpoints])


def _look_up(point: Checkpoint, quantity: str) -> float:
    return {**point._asdict(), **point.scores._asdict(), **point.norms}[quantity]


# --- Terminal ----------------------------------------------------------------------------------


def progress_bar(console: Console) -> Progress:
    """A progress bar whose tasks carry a field `note`."""
    return Progress(
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


Sections = list[list[list[str]]]


def summary(plain: Run, jsn: Run, real: Scores) -> Table:
    """The numbers of both runs; in each score the better run is bold, whichever it is."""
    table = Table(
        title=f"After {plain.last.step} steps",
        title_justify="left",
        caption="One run each, and a GAN never settles: training.png shows the whole way.",
        caption_justify="left",
    )
    for header in COLUMNS:
        table.add_column(header, justify="right" if header else "left")
    for section in sections(plain, jsn, real, bold="[bold]{}[/bold]"):
        for row in section:
            table.add_row(*row)
        table.add_section()
    return table


COLUMNS = ("", "plain critic", "with jsn", "real digits")


def sections(plain: Run, jsn: Run, real: Scores, bold: str) -> Sections:
    """The rows of the summary: norms, scores, time. `bold` marks the better score."""
    runs = (plain, jsn)
    norms = [
        [f"true norm of {layer}", *_cells([run.last.norms[layer] for run in runs], "{:.4f}"), ""]
        for layer in plain.last.norms
    ]
    products = [prod(run.last.norms.values()) for run in runs]
    distances = [run.last.scores.frechet for run in runs]
    shares = [run.last.scores.accuracy for run in runs]
    return [
        [*norms, ["product of the true norms", *_cells(products, "{:.4g}"), ""]],
        [
            [
                "Fréchet distance, lower is better",
                *_cells(distances, "{:.1f}", min(distances), bold),
                f"{real.frechet:.1f}",
            ],
            [
                "read as the digit asked for",
                *_cells(shares, "{:.1%}", max(shares), bold),
                f"{real.accuracy:.1%}",
            ],
        ],
        [["seconds of training", *_cells([run.seconds for run in runs], "{:.0f}"), ""]],
    ]


def _cells(
    values: Sequence[float], form: str, best: float | None = None, bold: str = "{}"
) -> list[str]:
    texts = [form.format(value) for value in values]
    return [
        bold.format(text) if value == best else text
        for text, value in zip(texts, values, strict=True)
    ]


def publish(root: Path, runs: Sequence[Run], held_out: Digits, real: Scores, settings: Any) -> None:
    """Renews the stored numbers, the table of the README, and the pictures of the documentation."""
    sys.path.append(str(root))  # the demo runs as a script, which does not see `benchmarks`
    from benchmarks import _report

    result = {
        "made": _report.circumstances(),
        "settings": settings._asdict(),
        "real": real._asdict(),
        "rows": [
            {"run": run.name, "seconds": round(run.seconds, 1), "norms": run.last.norms}
            | run.last.scores._asdict()
            for run in runs
        ],
    }
    _report.write_json(root / "benchmarks/results/demo.json", result)
    rows = [row for section in sections(*runs, real, bold="**{}**") for row in section]
    readme = root / "README.md"
    _report.write_parts(readme, "demo", {"table": _report.table(COLUMNS, rows)}, readme)
    write_pictures(root / "docs/img", runs, held_out, real, prefix="demo_")


# --- Pictures ----------------------------------------------------------------------------------


def write_pictures(
    out: Path, runs: Sequence[Run], held_out: Digits, real: Scores, prefix: str = ""
) -> list[Path]:
    """Writes the pictures into the folder `out`, which is made if need be."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        f"{prefix}samples.png": draw_samples(runs, held_out),
        f"{prefix}norms.png": draw_norms(runs),
        f"{prefix}training.png": draw_training(runs, real),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=150)
    return [out / name for name in figures]


def draw_samples(runs: Sequence[Run], held_out: Digits) -> Figure:
    """Real digits beside those of each run; every column asks for one digit."""
    panels = [("Real digits, held out", held_out)]
    for run in runs:
        scores = run.last.scores
        title = (
            f"GAN, {STYLES[run.name]['label']}\n"
            f"Fréchet distance {scores.frechet:.0f}, {scores.accuracy:.0%} read as asked"
        )
        panels.append((title, run.samples))
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    for axes, (title, digits) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(tile(digits), cmap="gray", vmin=-1.0, vmax=1.0)
        axes.set_title(title)
        axes.set_xticks(np.arange(N_CLASSES) * 9 + 4.5, [str(digit) for digit in range(N_CLASSES)])
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.set_xlabel("digit asked for")
    return figure


def tile(digits: Digits) -> NDArray[np.float32]:
    """One picture of `GRID_ROWS` examples of each digit, a column for each digit."""
    canvas = np.full((GRID_ROWS * 9 + 1, N_CLASSES * 9 + 1), 0.2, dtype=np.float32)
    for digit in range(N_CLASSES):
        examples = digits.images[digits.labels == digit][:GRID_ROWS]
        for row, image in enumerate(examples):
            top, left = row * 9 + 1, digit * 9 + 1
            canvas[top : top + 8, left : left + 8] = image[..., 0]
    return canvas


def draw_norms(runs: Sequence[Run]) -> Figure:
    """The true norm of every critic layer over time."""
    layers = list(runs[0].last.norms)
    figure = Figure(figsize=(3.2 * len(layers), 3.6), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), sharey=True), layers, strict=True):
        _draw_lines(axes, runs, layer)
        axes.set_title(layer)
    figure.axes[0].set_ylabel("largest singular value (log scale)")
    figure.axes[0].legend()
    figure.suptitle("True norm of each critic layer over time (float64 SVD of the kernel)")
    return figure


def draw_training(runs: Sequence[Run], real: Scores) -> Figure:
    """The critic's loss and both scores over time."""
    panels = {
        "critic_loss": ("Hinge loss of the critic", "mean since the last point (log scale)", nan),
        "frechet": ("Fréchet distance to real digits", "lower is better (log scale)", real.frechet),
        "accuracy": ("Read as the digit asked for", "share of pictures", real.accuracy),
    }
    figure = Figure(figsize=(12.0, 3.8), layout="constrained")
    for axes, (quantity, panel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        title, ylabel, real_score = panel
        _draw_lines(axes, runs, quantity)
        axes.axhline(real_score, **REAL_STYLE)
        axes.set(title=title, ylabel=ylabel)
    figure.axes[2].set(yscale="linear", ylim=(0.0, 1.02))
    figure.axes[1].legend()
    return figure


def _draw_lines(axes: Axes, runs: Sequence[Run], quantity: str) -> None:
    for run in runs:
        axes.plot(run.over_time("step"), run.over_time(quantity), marker=".", **STYLES[run.name])
    axes.set(xlabel="training step", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
