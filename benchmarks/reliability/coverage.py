"""Part six: which lines and branches of jsn the suite runs.

A line is left out by `# pragma: no cover` only with the reason beside it. What is neither run nor
left out is on the page, line by line.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = ("-q", "-n", "2", "--dist", "worksteal", "-m", "not slow", "--cov")


def run(*options: str) -> list[dict[str, Any]]:
    """Runs the suite under coverage.py: a row for each module of jsn.

    Raises:
        RuntimeError: If a test fails: then the lines that it would have run are missing.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "coverage.json"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *OPTIONS, f"--cov-report=json:{report}", *options],
            cwd=ROOT,
            env={**os.environ, "COVERAGE_FILE": str(report.with_suffix(".data"))},
        )
        if done.returncode:
            raise RuntimeError(f"coverage: the suite ended with {done.returncode}, expected 0")
        found = json.loads(report.read_text())["files"]
    return [_row(name, file) for name, file in sorted(found.items())]


def _row(name: str, file: dict[str, Any]) -> dict[str, Any]:
    summary = file["summary"]
    return {
        "module": name,
        "lines": summary["num_statements"],
        "lines_run": summary["covered_lines"],
        "branches": summary["num_branches"],
        "branches_run": summary["covered_branches"],
        "left_out": summary["excluded_lines"],
        "missing": file["missing_lines"],
        "missing_branches": file["missing_branches"],
    }
