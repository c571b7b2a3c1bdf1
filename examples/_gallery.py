"""What all examples of the gallery share: the command line, and the way from numbers to pages.

In: an example's four functions. Out: a printed table, a picture, and with `--save` the numbers as
`benchmarks/results/gallery/NAME.json`, the picture as `docs/img/gallery/NAME.png`, and the
generated parts of `docs/gallery/NAME.md` and `docs/gallery/index.md`. Page and picture are made
from the stored numbers alone. Must not know what any example is about.

An example is a file with four functions and, as its last line, a call of `main`:

    measure(smoke, progress) -> result    runs; `result` is plain JSON, `{"rows": [...], ...}`
    check(result)                         asserts what the example claims, in smoke as in full
    parts(result) -> {name: markdown}     tables of the page; "headline" goes to the index
    draw(result, figure)                  the picture
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import numpy as np
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(f"The gallery needs {error.name}. To install all it needs: pip install -e '.[demo]'")

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # an example runs as a script, which does not see `benchmarks`

from benchmarks._clock import use_one_core  # noqa: E402
from benchmarks._report import circumstances, read_json, write_json, write_parts  # noqa: E402

Result = dict[str, Any]

BLUE, ORANGE, GREEN, PINK, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)
"""Okabe and Ito's palette, which the colour-blind can tell apart: blue is always jsn."""


def main(
    name: str,
    doc: str,
    *,
    measure: Callable[[bool, Progress], Result],
    check: Callable[[Result], None],
    parts: Callable[[Result], Mapping[str, str]],
    draw: Callable[[Result, Figure], None],
) -> None:
    """Runs one example as its command line says."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, for CI; asserts the claim")
    parser.add_argument("--out", type=Path, default=Path("out/gallery"), help="folder for PICTURE")
    parser.add_argument("--save", action="store_true", help="full run: renew JSON, page, picture")
    parser.add_argument("--redraw", action="store_true", help="page and picture of stored numbers")
    options = parser.parse_args()
    if options.smoke and (options.save or options.redraw):
        parser.error("--smoke measures too little for --save, and nothing for --redraw")
    store = ROOT / f"benchmarks/results/gallery/{name}.json"
    if options.redraw:
        stored = read_json(store)
        if not stored:
            parser.error(f"--redraw: no numbers in {store.relative_to(ROOT)}, run --save first")
    else:
        use_one_core()
        made, start = circumstances(), time.perf_counter()
        with progress_bar() as progress:
            result = _plain(measure(options.smoke, progress))
        made["seconds"] = round(time.perf_counter() - start, 1)
        stored = {"made": made, "result": result}
    result = stored["result"]
    if options.save:
        write_json(store, stored)
    texts = dict(parts(result))
    for text in texts.values():
        print(f"\n{text}")
    publish = options.save or options.redraw
    picture = (ROOT / "docs/img/gallery" if publish else options.out) / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 4), layout="constrained")
    draw(result, figure)
    figure.savefig(picture, dpi=120)
    print(f"\nwrote {picture}")
    if publish:
        index, page = ROOT / "docs/gallery/index.md", ROOT / f"docs/gallery/{name}.md"
        write_parts(index, name, {"headline": texts.pop("headline")}, index)
        write_parts(page, name, {**texts, "made": _made(stored["made"])}, page)
    check(result)


def progress_bar() -> Progress:
    """A progress bar on stderr, so that tables on stdout can be kept."""
    return Progress(
        TextColumn("{task.description:>24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def spread(values: Iterable[Any], digits: str = ".3g", times: float = 1.0) -> str:
    """Median and range of the seeds, as in `97.1 (96.4 – 97.8)`; who diverged counts as NaN."""
    found = np.array(list(values), dtype=float) * times
    lost = int((~np.isfinite(found)).sum())
    kept = found[np.isfinite(found)]
    if not len(kept):
        return "diverged"
    text = f"{np.median(kept):{digits}}"
    if len(kept) > 1:
        text += f" ({kept.min():{digits}} – {kept.max():{digits}})"
    return text + (f", {lost} of {len(found)} diverged" if lost else "")


def lines(axes: Any, x: Sequence[float], seeds: Any, label: str, **style: Any) -> None:
    """Draws one line for each entry of the first axis of `seeds`, labelled once."""
    for i, line in enumerate(np.asarray(seeds, dtype=float)):
        axes.plot(x, line, label=label if i == 0 else None, **{"lw": 1.2, **style})


def _made(made: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"Measured {made['date'][:10]} with jsn {made['jsn']} on one core of "
        f"{made['cpu']}, in {made['seconds'] / 60:.0f} minutes on a machine that others used too; "
        f"{versions}."
    )


def _plain(value: Any) -> Any:
    """JSON of a result: arrays as lists, floats with six digits, what is not finite as null."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
