"""The tables of `docs/reliability.md`, from stored results."""

from __future__ import annotations

from typing import Any

from benchmarks import _report
from benchmarks.reliability import modes

Result = dict[str, Any]


def parts(result: Result) -> dict[str, str]:
    """The generated parts of the page; what has not been measured says so."""
    made = {
        "faults": _faults,
        "fuzz": _fuzz,
        "kills": _kills,
        "soak": _soak,
        "modes": _modes,
        "coverage": _coverage,
    }
    return {
        part: write(result[part]) + "\n\n" + _made(part, result[part]["made"])
        if part in result
        else f"Not measured yet: `make reliability ARGS='--only {part}'`."
        for part, write in made.items()
    }


def _made(part: str, made: Result) -> str:
    versions = made["versions"]
    return (
        f"`python -m benchmarks.reliability --only {part}`, {made['date'][:10]}, jsn "
        f"{made['jsn']}, Python {versions['python']}, JAX {versions['jax']}, "
        f"Flax {versions['flax']}, {made['cores']} cores."
    )


def _faults(result: Result) -> str:
    def error(worst: float | None) -> str:
        return "not finite" if worst is None else f"{worst:.1e}"

    rows = [
        [
            f"{row['where']}: {row['fault']}",
            error(row["worst"]),
            "never" if row["steps"] is None else str(row["steps"]),
        ]
        for row in result["rows"]
    ]
    back = [row["steps"] for row in result["rows"] if row["steps"] is not None]
    return (
        f"**{len(rows)} faults injected, {len(back)} recovered, in at most {max(back)} steps.**\n\n"
        + _report.table(["fault", "worst distance from the bound", "steps to recover"], rows)
    )


def _fuzz(result: Result) -> str:
    rows = result["rows"]
    inputs, crashes = (sum(row[key] for row in rows) for key in ("inputs", "crashes"))
    ran = sum(row["code_ran"] for row in rows)
    table = [
        [
            row["input"],
            str(row["inputs"]),
            str(row["read"]),
            str(row["told"]),
            str(row["crashes"]),
            f"{row['peak_mib']:g}",
            f"{row['longest_s']:g}",
        ]
        for row in rows
    ]
    head = ["input", "fuzzed", "read", "refused in one line", "crashes", "peak, MiB", "longest, s"]
    code = "no code from a file ran" if not ran else f"code from a file ran {ran} times"
    return f"**{inputs} inputs fuzzed, {crashes} crashes, {code}.**\n\n" + _report.table(
        head, table
    )


def _kills(result: Result) -> str:
    equal = "equal" if result["equal"] else "NOT equal"
    return (
        f"**{result['kills']} kills; {result['resumed']} of {result['resumes']} resumes went on "
        "from the last step that had been reported, or a later one; the final checkpoint is "
        f"bitwise {equal} to that of a run in peace.** The run has {result['steps']} steps. "
        f"{result['while_starting']} kills came before its first step, while JAX was starting, "
        f"and {result['while_writing']} left a checkpoint half written."
    )


def _soak(result: Result) -> str:
    rows = result["rows"]
    quarters = [rows[max(0, len(rows) * i // 4 - 1)] for i in (0, 1, 2, 3, 4)]
    furthest = max((abs(row["worst"] - 1) for row in rows), default=0.0)
    table = [
        [
            str(row["step"]),
            f"{row['worst'] - 1:+.1e}",
            f"{row['memory_mib']:.0f}",
            str(row["arrays"]),
            str(row["traces"]),
        ]
        for row in quarters
    ]
    traces = rows[-1]["traces"]
    finite = "all finite" if all(row["finite"] for row in rows) else "NOT all finite"
    head = ["step", "worst layer: norm − 1", "memory, MiB", "live arrays", "traces"]
    return (
        f"**{result['steps']} steps, {traces} trace{'s' * (traces != 1)}, {finite}; the worst "
        f"layer was never more than {furthest:.1e} from the bound**, seen every "
        f"{result['every']} steps.\n\n" + _report.table(head, table)
    )


def _modes(result: Result) -> str:
    rows = [
        [
            f"{row['versions']}: `{row['mode']}`",
            str(row["passed"]),
            str(row["failed"]),
            f"{row['seconds']}",
            row["jsn"],
        ]
        for row in result["rows"]
    ]
    files = ", ".join(f"`{test}`" for test in result["tests"])
    head = ["versions and mode", "passed", "failed", "seconds", "jsn"]
    left = "".join(f"\n\n`{m.name}` leaves out {m.why}." for m in modes.MODES if m.why)
    return f"The core tests: {files}.\n\n{_report.table(head, rows)}{left}"


def _coverage(result: Result) -> str:
    rows = result["rows"]
    total = {key: sum(row[key] for row in rows) for key in COUNTS}
    lines, branches = (_percent(total, kind) for kind in ("lines", "branches"))
    table = [
        [
            f"`{row['module']}`",
            _percent(row, "lines"),
            _percent(row, "branches"),
            ", ".join(map(str, row["missing"])) or "–",
            ", ".join(_branch(*branch) for branch in row["missing_branches"]) or "–",
        ]
        for row in rows
        if row["missing"] or row["missing_branches"]
    ]
    head = ["module", "lines run, %", "branches run, %", "lines not run", "branches not taken"]
    return (
        f"**{lines} % of {total['lines']} lines and {branches} % of {total['branches']} branches "
        f"of `jsn/` are run by the suite**; {total['left_out']} lines that are for type checkers, "
        "or left out with a reason beside them, do not count. Modules of which something is not "
        "run:\n\n" + _report.table(head, table)
    )


COUNTS = ("lines", "lines_run", "branches", "branches_run", "left_out")


def _percent(row: Result, kind: str) -> str:
    return f"{100 * row[f'{kind}_run'] / row[kind]:.1f}" if row[kind] else "–"


def _branch(begin: int, end: int) -> str:
    return f"{begin} to {end}" if end > 0 else f"{begin} to the end"
