"""What spectral normalization costs: jsn beside every other implementation, in one run.

All libraries normalize the same weights in turns, in one process with one thread, so that
whatever disturbs the machine disturbs all of them. The parts:

    small vit_ti vit_s resnet50 critic scanned
                normalizing alone: time, how true the worst layer is, bytes, compile time, memory
    equal       what one vector costs that is as true as the default
    step        a whole training step of an SN-GAN critic
    evaluation  the program that is left after folding
    layers width uses
                how time and compile time grow

The time of a row is that of one call with everything compiled; the ratio is the median over the
rounds of its time by Flax's in the same round. Compile time is tracing, lowering and compiling,
with imports paid before. The norm is the worst layer's, by float64 SVD of what is handed to the
model, at four moments along one way of raw weights that is the same for all (`_cases.trajectory`
says how it is made): a model of training, not training. Norms from real training, in which each
method makes its own way, are those of `truth`.

    python -m benchmarks speed                  forty minutes on a quiet machine
    python -m benchmarks speed --only step      one part, or several
    python -m benchmarks speed --resume         the parts that this version has not measured yet
    python -m benchmarks speed --only page      only the pages, from stored results
    python -m benchmarks speed --smoke          a minute, writes into out/

Anywhere but on the CPU (`JAX_PLATFORMS=cuda`) it leaves PyTorch out and writes no pages of the
documentation.

Writes `benchmarks/results/speed.json`, the tables of `README.md` and `docs/speed.md`, and
`docs/img/speed_*.png`. A library that is not installed is said to be so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import _clock, _report

CASES = ("small", "vit_ti", "vit_s", "resnet50", "critic", "scanned")
OTHERS = ("equal", "step", "evaluation", "layers", "width", "uses")
PARTS = (*CASES, *OTHERS)
PLATFORM = os.environ.get("JAX_PLATFORMS") or "cpu"
"""Where it runs. What other than "cpu" gives has a file of its own, and no page."""
PEERS = ("dm-haiku", "equinox", "keras", "torch")

FULL: dict[str, Any] = {
    "smoke": False,
    "without": (),
    "steps": 32,
    "seconds": 16.0,
    "equal_steps": (1, 2, 4, 8, 16, 32, 64, 128),
    "batches": (4, 32),
    "step_seconds": 30.0,  # a step with a batch of 32 takes a third of a second
    "step_processes": 5,  # where one happens to get its memory changes ratios by up to 0.02
    "depth": 4,
    "uses": (1, 2, 4, 8),
    "layers": (10, 30, 100, 300, 1000),
    "widths": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "growth_seconds": 2.5,
    "compile_seconds": 12.0,
    "compile_limit": 36.0,
}
SMOKE: dict[str, Any] = FULL | {
    "smoke": True,
    "without": ("PyTorch, torch.compile",),
    "steps": 8,
    "seconds": 0.2,
    "equal_steps": (1, 4),
    "batches": (1,),
    "step_seconds": 0.2,
    "step_processes": 1,
    "depth": 2,
    "uses": (2,),
    "layers": (2,),
    "widths": (8,),
    "growth_seconds": 0.1,
    "compile_seconds": 0.0,
}
SMOKE_PARTS = ("small", *OTHERS)


def measure(
    parts: Sequence[str], settings: dict[str, Any], tick: Callable[[float], None]
) -> Iterator[tuple[str, _clock.Row]]:
    """Measures in this process: the cases together, so that imports are paid once."""
    from benchmarks import _growth, _normalizing, _training

    measured = {
        "equal": _normalizing.measure_equal,
        "step": _training.measure_step,
        "evaluation": _training.measure_evaluation,
        "layers": _growth.measure_layers,
        "width": _growth.measure_width,
        "uses": _training.measure_uses,
    }
    yield from measured.get(parts[0], _normalizing.measure_cases)(parts, settings, tick)


def measure_apart(
    parts: Sequence[str], settings: dict[str, Any], tick: Callable[[float], None]
) -> Iterator[tuple[str, _clock.Row]]:
    """Measures in a process of its own; the training step in several, one after the other."""
    n = settings["step_processes"] if parts == ["step"] else 1
    found: list[_clock.Row] = []
    for index in range(n):
        part_of = lambda done, index=index: tick((index + done) / n)
        for part, rows in _clock.run_apart(measure, parts, settings, tick=part_of):
            found.append(rows)
            yield part, rows if n == 1 else _clock.typical(found)


def run(
    parts: Sequence[str], settings: dict[str, Any], result: dict[str, Any], stored: Any
) -> None:
    """Runs parts, one process after the other, and stores each as soon as it is done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    os.environ.update(_report.ONE_THREAD | {"JAX_PLATFORMS": PLATFORM, "KERAS_BACKEND": "jax"})
    if PLATFORM != "cpu":
        settings = settings | {"without": ("PyTorch", "PyTorch, torch.compile")}
    cases = [part for part in parts if part in CASES]
    groups = ([cases] if cases else []) + [[part] for part in parts if part not in CASES]
    columns = (TextColumn("{task.description:11}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for group in groups:
            bar = progress.add_task(" ".join(group) if len(group) == 1 else "cases", total=1.0)
            tick = lambda done, bar=bar: progress.update(bar, completed=done)
            made = circumstances()
            for part, rows in measure_apart(group, settings, tick):
                result[part] = {"made": made, **rows}
                _report.write_json(stored, result)
            progress.update(bar, completed=1.0)


def circumstances() -> dict[str, Any]:
    """Those of every benchmark, and the versions of the other libraries."""
    made: dict[str, Any] = _report.circumstances() | {"platform": PLATFORM}
    for name in PEERS:
        try:
            made["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            made["versions"][name] = "not installed"
    return made


def is_current(part: dict[str, Any]) -> bool:
    """Whether a part was measured with this commit and these versions."""
    now = circumstances()
    then = part.get("made", {})
    clean = not now["jsn"].endswith("+")
    return clean and all(then.get(name) == now[name] for name in ("jsn", "versions", "cpu"))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="a minute, to see that it runs")
    parser.add_argument(
        "--only", nargs="+", choices=(*PARTS, "page"), metavar="PART", help="parts, or: page"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what this version has already measured"
    )
    args = parser.parse_args(argv)

    folder = _report.ROOT / "out" if args.smoke or PLATFORM != "cpu" else _report.ROOT
    name = "speed" if PLATFORM == "cpu" else f"speed_{PLATFORM}"
    stored = folder if args.smoke else _report.ROOT / "benchmarks/results"
    stored = stored / f"{name}.json"
    result = _report.read_json(stored)
    wanted = args.only or (SMOKE_PARTS if args.smoke else PARTS)
    parts = [part for part in PARTS if part in wanted]
    if args.resume:
        parts = [part for part in parts if not is_current(result.get(part, {}))]
    run(parts, SMOKE if args.smoke else FULL, result, stored)

    from benchmarks import _speed_page

    _speed_page.write(result, folder)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
