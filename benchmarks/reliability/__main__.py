"""`python -m benchmarks.reliability`: runs the parts, stores them, and writes the page."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import _report
from benchmarks.reliability import _page, modes

PARTS = ("faults", "fuzz", "kills", "soak", "modes", "coverage")
STORED = _report.ROOT / "benchmarks/results/reliability.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description="Faults, hostile files, kills, a soak, the modes of JAX, coverage: measured.",
    )
    parser.add_argument("--only", choices=(*PARTS, "page"), nargs="+", help="some of the parts")
    parser.add_argument("--inputs", type=int, default=2000, help="fuzzed files of each format")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--soak-steps", type=int, default=20_000)
    parser.add_argument("--modes", nargs="+", choices=[mode.name for mode in modes.MODES])
    parser.add_argument("--environments", nargs="+", default=list(modes.ENVIRONMENTS))
    parser.add_argument("--tests", nargs="+", default=list(modes.TESTS), help="for the modes")
    return parser


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar; the function advances it, by 1 where it is given no number."""
    from rich import progress

    with progress.Progress(*progress.Progress.get_default_columns(), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda n=1: bar.advance(task, n if isinstance(n, int) else 1)


def _faults(_: argparse.Namespace) -> Any:
    from benchmarks.reliability import faults

    with _bar("faults", len(faults.FAULTS)) as tick:
        rows = []
        for fault in faults.FAULTS:
            row = faults.strike(fault)._asdict()
            rows.append(row | {"worst": row["worst"] if math.isfinite(row["worst"]) else None})
            tick()
    return {"rows": rows, "before": faults.BEFORE, "after": faults.AFTER}


def _fuzz(options: argparse.Namespace) -> Any:
    from benchmarks.reliability import fuzz

    with _bar("fuzz", options.inputs * len(fuzz.TARGETS)) as tick:
        return {"rows": fuzz.run(options.inputs, tick)}


def _kills(options: argparse.Namespace) -> Any:
    from benchmarks.reliability import kills

    with _bar("kills", options.kills + 2) as tick:
        return kills.run(options.kills, tick)


def _soak(options: argparse.Namespace) -> Any:
    from benchmarks.reliability import soak

    with _bar("soak", options.soak_steps) as tick:
        return soak.run(options.soak_steps, max(1, options.soak_steps // 40), tick)


def _modes(options: argparse.Namespace) -> Any:
    total = sum(len(modes.chosen(name, options.modes)) for name in options.environments)
    version = {"jsn": _report.circumstances()["jsn"]}  # rows of several versions come together
    with _bar("modes", total) as tick:
        rows = modes.run(options.environments, options.modes, options.tests, tick)
    stored = _report.read_json(STORED).get("modes", {"rows": []})["rows"]
    rows = modes.merged(stored, [row | version for row in rows])
    return {"rows": rows, "tests": options.tests}


def _coverage(_: argparse.Namespace) -> Any:
    from benchmarks.reliability import coverage

    return {"rows": coverage.run()}


def main() -> None:
    """Runs the parts that are asked for; each is stored as soon as it is done."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options = _parser().parse_args()
    runs = {"faults": _faults, "fuzz": _fuzz, "kills": _kills, "soak": _soak, "modes": _modes}
    runs["coverage"] = _coverage
    for part in PARTS:
        if options.only is None or part in options.only:
            made = _report.circumstances()
            measured = {"made": made, **runs[part](options)}
            # Read only now: another process may have stored another part in the meantime.
            _report.write_json(STORED, _report.read_json(STORED) | {part: measured})
    parts = _page.parts(_report.read_json(STORED))
    print("\n\n".join(parts.values()))
    page = _report.ROOT / "docs/reliability.md"
    _report.write_parts(page, "reliability", parts, template=page)


if __name__ == "__main__":
    main()
