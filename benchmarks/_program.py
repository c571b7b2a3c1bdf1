"""The command line of a benchmark that measures its parts one after the other, and fills one page.

In: a function that measures each part, and one that makes the page's tables of the results. Out:
JSON, tables on the screen, and the page. Must not know what is measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks import _clock, _report

Settings = dict[str, Any]
Result = dict[str, Any]


class Program(NamedTuple):
    """What differs from one benchmark to the next."""

    name: str
    doc: str
    page: str
    """The page in `docs/` that gets the tables."""
    measures: Mapping[str, Callable[[Settings], list]]
    """By part. Each runs in a process of its own, on one core, where JAX is imported."""
    parts: Callable[[Result], dict[str, str]]
    full: Settings
    smoke: Settings
    smoke_help: str

    def main(self, argv: list[str]) -> None:
        """Runs the parts asked for, stores each as soon as it is measured, and fills the page."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks {self.name}",
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--smoke", action="store_true", help=self.smoke_help)
        parser.add_argument("--only", choices=(*self.measures, "page"), help="one part")
        args = parser.parse_args(argv)

        settings = self.smoke if args.smoke else self.full
        folder = _report.ROOT / "out" if args.smoke else _report.ROOT
        name = f"{self.name}.json"
        stored = folder / (name if args.smoke else f"benchmarks/results/{name}")
        result = _report.read_json(stored)
        os.environ.update(_report.ONE_THREAD)
        for part, measure in self.measures.items():
            if args.only not in (None, part):
                continue
            made = _report.circumstances()
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, context, _clock.use_one_core) as pool:
                rows = pool.submit(measure, settings).result()
            result[part] = {"made": made, "settings": settings, "rows": rows}
            _report.write_json(stored, result)
        parts = self.parts(result)
        print("\n\n".join(parts.values()))
        page = f"docs/{self.page}"
        _report.write_parts(folder / page, self.name, parts, template=_report.ROOT / page)
