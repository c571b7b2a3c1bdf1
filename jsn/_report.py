"""Station 10, an audit to look at: text, a rich table, HTML, JSON, a picture.

In: an `Audit`. Out: its rows as someone reads them. Bounds are rounded up, so that what is shown
is a bound too. Must not know how anything was measured.
"""

from __future__ import annotations

import decimal
import html as _html
import math
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jsn import _errors
from jsn._files import shorten

if TYPE_CHECKING:
    from jsn._audit import Audit

_WORST = 5
"""Layers whose spectra are drawn."""
_LISTED = 8
"""Leaves left alone that a table names."""


# --- cells ------------------------------------------------------------------------------------


def number(x: float | None, up: bool = False) -> str:
    """A number in five digits, rounded to nearest or up."""
    if x is None or math.isnan(x):
        return "-" if x is None else "nan"
    if math.isinf(x) or x == 0:
        return f"{x:g}"
    rounding = decimal.ROUND_CEILING if up else decimal.ROUND_HALF_EVEN
    short = decimal.Context(prec=5, rounding=rounding).create_decimal(x)
    return f"{float(short):#.5g}".rstrip(".")


def size(n: float | int) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _cell(x: Any, up: bool = False) -> str:
    """The largest of the numbers of a row."""
    return number(None if x is None else float(np.max(x)), up)


_HEAD = ["path", "shape", "dtype", "view", "sigma", "bound", "frobenius", "stable rank"]
_LEFT = 4
"""Columns that hold words."""


def _table(audit: Audit) -> tuple[list[str], list[list[str]]]:
    after = any(row.normalized is not None for row in audit.rows)
    head = [*_HEAD, "condition", *(["normalized"] if after else []), "size"]
    rows = [
        [
            shorten(row.path) + (" !" if row.warnings else ""),
            "x".join(map(str, row.shape)),
            row.dtype,
            row.view,
            _cell(row.sigma),
            _cell(row.bound, up=True),
            _cell(row.frobenius),
            _cell(row.stable_rank),
            _cell(row.condition),
            *([_cell(row.normalized)] if after else []),
            size(row.bytes),
        ]
        for row in audit.rows
    ]
    return head, rows


def _remarks(audit: Audit) -> list[str]:
    """The lines below a table."""
    lines = []
    if audit.rows:
        count = f"{len(audit.rows)} weight{'s' * (len(audit.rows) > 1)}"
        total, product = size(sum(row.bytes for row in audit.rows)), number(audit.product, up=True)
        lines.append(f"{count}, {total}; product of the bounds {product}")
    if any(np.ndim(row.sigma) for row in audit.rows):
        lines.append(
            "Where a row stands for several matrices, the largest of each number is shown."
        )
    told = [(row.path, row.warnings) for row in (*audit.rows, *audit.left_alone) if row.warnings]
    lines += [f"! {shorten(path)}: {'; '.join(warnings)}" for path, warnings in told]
    notes: dict[str, list[str]] = {}
    for row in audit.rows:
        for note in row.notes:
            notes.setdefault(note, []).append(shorten(row.path))
    lines += [f"{note} ({_list(paths)})" for note, paths in notes.items()]
    if audit.left_alone:
        paths = [
            shorten(leaf.path) + (f" ({leaf.note})" if leaf.note else "")
            for leaf in audit.left_alone
        ]
        lines.append(f"left alone: {_list(paths)}")
    return lines


def _list(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", and {rest} more" if rest > 0 else "")


# --- renderings -------------------------------------------------------------------------------


def text(audit: Audit) -> str:
    """Aligned columns, in plain characters."""
    head, rows = _table(audit)
    lines = []
    if rows:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for cells in ([head], rows):
            for row in cells:
                lines.append("  ".join(_aligned(i, cell, widths[i]) for i, cell in enumerate(row)))
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append("")
    return "\n".join(line.rstrip() for line in [*lines, *_remarks(audit)])


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < _LEFT else cell.rjust(width)


def rich_table(audit: Audit) -> Any:
    """A rich renderable.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        what = "a table for rich"
        raise ImportError(_errors.missing_extra("jsn.audit", "rich", what)) from None
    head, rows = _table(audit)
    table = Table(box=box.SIMPLE_HEAD)
    for column, name in enumerate(head):
        words = column < _LEFT
        table.add_column(
            name, justify="left" if words else "right", overflow="fold", no_wrap=not words
        )
    for cells, row in zip(rows, audit.rows, strict=True):
        style = "bold red" if row.warnings else ""
        table.add_row(*[Text(cell) for cell in cells], style=style)  # Text: no markup from names
    remarks = [
        Text(line, style="bold red" if line.startswith("!") else "") for line in _remarks(audit)
    ]
    return Group(*([table] if rows else []), *remarks)


def html(audit: Audit) -> str:
    """A table for notebooks."""
    head, rows = _table(audit)
    escape = _html.escape

    def line(cells: Sequence[str], tag: str, bad: bool = False) -> str:
        color = ' style="color: #c00"' if bad else ""
        tags = [
            f'<{tag} style="text-align: {"left" if i < _LEFT else "right"}">{escape(cell)}</{tag}>'
            for i, cell in enumerate(cells)
        ]
        return f"<tr{color}>{''.join(tags)}</tr>"

    body = [
        line(cells, "td", bool(row.warnings)) for cells, row in zip(rows, audit.rows, strict=True)
    ]
    remarks = "".join(f"<p>{escape(remark)}</p>" for remark in _remarks(audit))
    return (
        f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(body)}</tbody></table>{remarks}"
    )


def as_dict(audit: Audit) -> dict[str, Any]:
    """What `to_json` writes: numbers that are not finite are None, and a warning says so."""
    rows = []
    for row in audit.rows:
        warnings = list(row.warnings)
        values = {
            name: _finite(name, getattr(row, name), warnings)
            for name in ("sigma", "bound", "frobenius", "stable_rank", "condition", "normalized")
        }
        rows.append(
            {
                "path": row.path,
                "shape": list(row.shape),
                "dtype": row.dtype,
                "view": row.view,
                **values,
                "bytes": row.bytes,
                "warnings": warnings,
                "notes": list(row.notes),
            }
        )
    warnings: list[str] = []
    return {
        **({"source": audit.source} if audit.source else {}),
        "rows": rows,
        "product": _finite("product", audit.product, warnings),
        "warnings": warnings,
        "left_alone": [
            {
                "path": leaf.path,
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "bytes": leaf.bytes,
                "note": leaf.note,
                "warnings": list(leaf.warnings),
            }
            for leaf in audit.left_alone
        ],
    }


def _finite(name: str, value: Any, warnings: list[str]) -> Any:
    if value is None:
        return None
    if np.ndim(value):
        return [_finite(name, x, warnings) for x in value]
    value = float(value)
    if math.isfinite(value):
        return value
    what = f"{name} is {'not a number' if math.isnan(value) else 'infinite'}"
    if what not in warnings:
        warnings.append(what)
    return None


def write(path: Any, content: bytes) -> None:
    """Writes a whole file, or none."""
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


# --- picture ----------------------------------------------------------------------------------


def plot(audit: Audit, path: Any) -> None:
    """Draws norms along depth, and the spectra of the worst layers.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(_errors.missing_extra("jsn.audit", "matplotlib", "a plot")) from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    depth, spectra = figure.subplots(1, 2)
    _plot_depth(depth, audit)
    _plot_spectra(spectra, audit)
    figure.savefig(path, dpi=120)


def _usable(audit: Audit) -> list[tuple[int, str, float]]:
    found = [(i, row.path, float(np.max(row.sigma))) for i, row in enumerate(audit.rows)]
    return [(i, path, sigma) for i, path, sigma in found if math.isfinite(sigma) and sigma > 0]


def _label(path: str) -> str:
    path = shorten(path.removesuffix("/kernel").removesuffix("/weight"), 28)
    return path.replace("$", r"\$")  # no mathematics from names


def _plot_depth(axes: Any, audit: Audit) -> None:
    shown = _usable(audit)
    axes.plot([i for i, _, _ in shown], [s for _, _, s in shown], "o-", ms=4, lw=1, color="C0")
    missing = sorted({*range(len(audit.rows))} - {i for i, _, _ in shown})
    for i in missing:
        axes.axvline(i, color="C3", lw=1, ls=":", label="_" if i != missing[0] else "0 or NaN")
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    axes.set(yscale="log", ylabel="sigma", title="Norms along depth")
    if len(audit.rows) <= 24:
        labels = [_label(row.path) for row in audit.rows]
        slanted = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        roomy = sum(map(len, labels)) < 60
        axes.set_xticks(range(len(labels)), labels, fontsize=8, **({} if roomy else slanted))
    else:
        axes.set_xlabel("weight")
    _plain_ticks(axes.yaxis)
    if missing:
        axes.legend(fontsize=8)


def _plain_ticks(axis: Any) -> None:
    """Labels a logarithmic axis with plain numbers: the more of them, the shorter it is."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    digits = (2, 3, 5) if decades < 1.4 else (2, 5) if decades < 2.4 else ()

    def between(x: float, _: Any) -> str:
        digit = round(x / 10 ** math.floor(math.log10(x)), 9)
        return f"{x:.3g}" if decades < 0.5 or digit in digits else ""

    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(between)


def _plot_spectra(axes: Any, audit: Audit) -> None:
    worst = sorted(_usable(audit), key=lambda shown: -shown[2])
    known = [(path, audit.rows[i].spectrum) for i, path, _ in worst]
    drawn = [(path, values) for path, values in known if values is not None][:_WORST]
    for path, values in drawn:
        values = np.maximum(values, values[0] * 1e-8)
        axes.plot(np.arange(1, len(values) + 1), values, lw=1.3, label=_label(path))
        axes.plot(1, values[0], "o", ms=3, color=axes.lines[-1].get_color())
    axes.set(xscale="log", yscale="log", xlabel="index", ylabel="singular value")
    axes.set_title("Spectra of the largest norms")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    if drawn:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "no spectrum was computed", ha="center", transform=axes.transAxes)
