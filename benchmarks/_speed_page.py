"""The tables of `speed`: between markers of `README.md` and `docs/speed.md`.

In: stored results, any parts of them. Out: the same numbers for reading. A part that was not
measured says so. Must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _report, _speed_plots
from benchmarks.speed import CASES, OTHERS

NOT_YET = "Not measured yet: `python -m benchmarks speed` on a quiet machine fills this in."
ABSENT = "–"
PLAIN, FLAX, OURS = "no normalization", "Flax linen", "jsn, default"
FLOOR = "floor: one normalized, the rest scaled"
RAW = (
    PLAIN,
    "copy of the weights",
    "only the products of block 8",
    "only the products of the default",
    "and what keeps its block",
)
"""Rows that do not normalize."""

Result = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def write(result: Result, folder: Path) -> None:
    """Writes the pages and pictures below a folder, and prints the tables."""
    docs = folder / "docs" if folder == _report.ROOT else folder
    parts = {name: NOT_YET for name in (*CASES, *OTHERS, "made")}
    parts |= {name: case_part(result[name]) for name in CASES if name in result}
    writers = {"equal": equal_table, "step": step_table, "evaluation": evaluation_table}
    writers["layers"] = layers_table
    for name, writer in writers.items():
        if name in result:
            parts[name] = _report.table(*writer(result[name]))
    for name in _speed_plots.draw(result, docs / "img"):
        picture = _speed_plots.PICTURES[name]
        parts[name] = "\n\n".join(filter(None, (picture, parts[name] if name in writers else "")))
    if result:
        parts["made"] = made(result)
    _report.write_parts(docs / "speed.md", "speed", parts, _report.ROOT / "docs/speed.md")
    brief = {"normalizing": NOT_YET, "training": NOT_YET}
    if any(name in result for name in CASES):
        brief["normalizing"] = _report.table(*brief_table(result))
    if "step" in result:
        brief["training"] = _report.table(*step_table(result["step"]))
    _report.write_parts(folder / "README.md", "speed", brief, _report.ROOT / "README.md")
    for name, content in (brief | parts).items():
        if content != NOT_YET:
            print(f"\n{name}\n{content}")
    print(docs / "speed.md", folder / "README.md", sep="\n")


# --- numbers ----------------------------------------------------------------------------------


def _times(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent_above(norm: float) -> str:
    """By how much a norm is above 1, with two digits that mean something; rounding counts as 0."""
    excess = 100 * (norm - 1)
    if abs(excess) < 5e-4:
        return "0"
    return f"{excess:.0f}" if excess >= 9.95 else f"{excess:.2g}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


# --- tables -----------------------------------------------------------------------------------


def brief_table(result: Result) -> Table:
    """All cases side by side: time as multiples of Flax's, and the worst layer of any of them."""
    cases = [result[name] for name in CASES if name in result]
    by_name: dict[str, list[Any]] = {}
    for index, case in enumerate(cases):
        for row in case["rows"]:
            by_name.setdefault(row["name"], [{}] * len(cases))[index] = row
    head = ("", *(case["title"] for case in cases), "worst layer, % above 1")
    rows = []
    for name, found in by_name.items():
        if name == PLAIN:
            continue
        ratios = [row.get("missing") or _times(row.get("ratio")) for row in found]
        worst = [row["worst"] for row in found if "worst" in row]
        raw = name in RAW or not worst
        rows.append((_bold(name), *ratios, ABSENT if raw else percent_above(max(worst))))
    return head, rows


def _bold(name: str) -> str:
    return f"**{name}**" if name == OURS else name


def case_part(case: Mapping[str, Any]) -> str:
    """One case in full, under what it is made of."""
    what = f"{case['weights']} weights, {_size(case['parameter_bytes'])}:"
    return f"{what}\n\n{_report.table(*case_table(case))}"


def case_table(case: Mapping[str, Any]) -> Table:
    head = ("", "time, ms", "× Flax", "× copy", "worst layer, % above 1", "bytes / parameter bytes")
    head = (*head, "extra memory / parameter bytes", "trace + compile, s", "making the state, s")
    rows = []
    for row in case["rows"]:
        if "missing" in row:
            rows.append((row["name"], row["missing"], *[""] * (len(head) - 2)))
            continue
        raw = row["name"] in RAW
        share = lambda key, row=row: (
            _times(row[key] / case["parameter_bytes"]) if key in row else ABSENT
        )
        seconds = lambda key, row=row: f"{row[key]:.2f}" if key in row else ABSENT
        rows.append(
            (
                _bold(row["name"]),
                _ms(row["ms_median"]),
                _times(row["ratio"]),
                _times(row.get("ratio_copy")),
                "not normalized" if raw else percent_above(row["worst"]),
                share("bytes"),
                share("temporary"),
                seconds("compile_s"),
                ABSENT if raw else seconds("init_s"),
            )
        )
    return head, rows


def equal_table(part: Mapping[str, Any]) -> Table:
    """One vector with more and more steps, beside the default; the first as true is bold."""
    rows = {row["name"]: row for row in part["rows"]}
    goal, cost = rows[OURS]["worst"], rows[OURS]["ms_median"]
    enough = next(
        (n for n, row in rows.items() if n.startswith("one") and row["worst"] <= goal), None
    )
    head = ("", "worst layer, % above 1", "time, ms", "× the default")
    return head, [
        (
            f"**{name}**" if name in (OURS, enough) else name,
            percent_above(row["worst"]),
            _ms(row["ms_median"]),
            _times(row["ms_median"] / cost),
        )
        for name, row in rows.items()
    ]


def step_table(part: Mapping[str, Any]) -> Table:
    """A whole training step as multiples of the same step without normalization.

    Medians of several processes, and the range of those.
    """
    batches = list(dict.fromkeys(row["batch"] for row in part["rows"]))
    rows: dict[str, dict[int, str]] = {}
    for row in part["rows"]:
        low, high = row.get("ratios", (row["ratio"],) * 2)
        spread = f" ({low:.3f} to {high:.3f})" if low < high else ""
        rows.setdefault(row["name"], {})[row["batch"]] = f"{row['ratio']:.3f}{spread}"
    head = ("training step", *(f"batch {batch}" for batch in batches))
    labels = {"jsn, decorator": "jsn, decorator, twice", FLAX: "Flax linen's wrapper, twice"}
    return head, [
        (labels.get(name, name), *(found[batch] for batch in batches))
        for name, found in rows.items()
    ]


def evaluation_table(part: Mapping[str, Any]) -> Table:
    head = ("evaluation", "products in the program", "the plain model's program", "time")
    return head, [
        (
            row["name"],
            str(row["products"]),
            "the same" if row["same_program"] else "no",
            f"{row['ratio']:.2f}",
        )
        for row in part["rows"]
    ]


def layers_table(part: Mapping[str, Any]) -> Table:
    """Trace plus compile, in seconds, and what that and its floor are of Flax's."""
    found = {(row["kind"], row["layers"], row["name"]): row["compile_s"] for row in part["rows"]}
    names = list(dict.fromkeys(name for _, _, name in found))
    head = ("trace + compile, s", *names, "normalized once, × Flax", "floor, × Flax")
    rows = []
    for kind, layers in dict.fromkeys((kind, layers) for kind, layers, _ in found):
        seconds = [found.get((kind, layers, name)) for name in names]
        flax = found.get((kind, layers, FLAX))
        those = (found.get((kind, layers, name)) for name in ("jsn, normalized once", FLOOR))
        ratios = [_times(value / flax if value and flax else None) for value in those]
        cells = [ABSENT if value is None else f"{value:.2f}" for value in seconds]
        rows.append((f"{layers} layers, {kind}", *cells, *ratios))
    return head, rows


def made(result: Result) -> str:
    """When, where and with what: one line for each set of circumstances."""
    lines: dict[str, list[str]] = {}
    for name, part in result.items():
        about = part["made"]
        versions = ", ".join(f"{package} {found}" for package, found in about["versions"].items())
        text = (
            f"measured {about['date'][:10]} with jsn {about['jsn']} on {about['cpu']}, one core of "
            f"{about['cores']}; {versions}."
        )
        lines.setdefault(text, []).append(f"{name} ({about['load_before']})")
    return "\n\n".join(
        f"Parts, and the machine's load before each: {', '.join(names)}. These were {text}"
        for text, names in lines.items()
    )
