"""Part five: the core tests under each mode of JAX, and on each version that is installed.

A mode is an environment variable. All of them run on the development versions, and on the oldest
and the newest what is the default there. Tests that a mode rules out by what it is are left out by
name, and the page says why.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
TESTS = ("tests/test_power.py", "tests/test_normalize.py", "tests/test_linen.py")
ENVIRONMENTS = (".venv", ".venv-newest", ".venv-oldest")


class Mode(NamedTuple):
    """One way to run JAX."""

    name: str
    environment: dict[str, str]
    without: str = ""
    """Tests left out, as an expression for `pytest -k`."""
    why: str = ""
    everywhere: bool = False
    """On the oldest and the newest versions too."""


MODES = (
    Mode("default", {}, everywhere=True),
    Mode("jax_enable_x64", {"JAX_ENABLE_X64": "1"}),
    Mode("jax_numpy_rank_promotion=raise", {"JAX_NUMPY_RANK_PROMOTION": "raise"}),
    Mode("jax_numpy_dtype_promotion=strict", {"JAX_NUMPY_DTYPE_PROMOTION": "strict"}),
    Mode(
        "jax_debug_nans",
        {"JAX_DEBUG_NANS": "1"},
        without="not_finite or broken or unusable or donates",
        why="those that feed it a NaN, and the one that wants its arguments donated, which this "
        "mode keeps to run again what has failed",
    ),
    Mode("jax_check_tracer_leaks", {"JAX_CHECK_TRACER_LEAKS": "1"}),
    Mode(
        "jax_disable_jit",
        {"JAX_DISABLE_JIT": "1"},
        without="donates",
        why="the one that wants its arguments donated: what is not compiled donates nothing",
    ),
)


def chosen(environment: str, names: list[str] | None) -> list[Mode]:
    """The modes of these names, or all, that run in an environment."""
    return [
        mode
        for mode in MODES
        if (mode.everywhere or environment == ENVIRONMENTS[0]) and (not names or mode.name in names)
    ]


def versions(environment: str) -> str | None:
    """Python, JAX and Flax of an environment, or None where it is not installed."""
    python = ROOT / environment / "bin" / "python"
    if not (ROOT / environment / ".has-test").exists() or not python.exists():
        return None
    code = (
        "import platform as p; from importlib.metadata import version as v;"
        "print('Python', p.python_version() + ', JAX', v('jax') + ', Flax', v('flax'))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def run(
    environments: list[str],
    names: list[str] | None,
    tests: list[str],
    tick: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Runs the tests in each mode, by name, of each environment that is installed."""
    rows = []
    for environment in environments:
        found = versions(environment)
        if found is None:
            continue
        for mode in chosen(environment, names):
            rows.append({"versions": found, "mode": mode.name, **_run(environment, mode, tests)})
            tick(mode.name)
    return rows


def merged(stored: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored rows with those that were run again in their place, and new ones behind."""
    of = lambda row: (row["versions"], row["mode"])
    return list(({of(row): row for row in stored} | {of(row): row for row in rows}).values())


def _run(environment: str, mode: Mode, tests: list[str]) -> dict[str, Any]:
    python = ROOT / environment / "bin" / "python"
    options = ["-q", "-n", "2", "--dist", "worksteal", "-m", "not slow", "-p", "no:cacheprovider"]
    options += ["-k", f"not ({mode.without})"] if mode.without else []
    begin = time.perf_counter()
    done = subprocess.run(
        [python, "-m", "pytest", *options, *tests],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **mode.environment},
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) ([a-z]+)", last)}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in failed:
        print(line, file=sys.stderr)
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        "seconds": round(time.perf_counter() - begin),
        "status": done.returncode,
    }
