"""The command `jsn`: `jsn audit FILE` and `jsn demo`.

In: arguments. Out: a table on stdout, one line on stderr where something is wrong, and an exit
status: 0 if all is well, 1 if not, 2 if the arguments make no sense. Must not know formats or
spectra.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from jsn import _errors
from jsn._audit import Audit, audit_entries
from jsn._conv import Conv
from jsn._errors import Problem
from jsn._files import Checkpoint, Entry, Unreadable, open_checkpoint, shorten
from jsn._operator import Matrix
from jsn._rules import FLAX, TORCH

_RULES = """\
rules:
  A leaf is a weight if a rule matches its path: names split at "/" and ".", without a leading
  "params". By default leaves called kernel are weights as Flax lays them out, inputs before
  outputs, and leaves called weight as PyTorch does, outputs first. Your own rules come before
  these; the first whose regular expression is found in the path decides. VIEW is one of

    none                         leave it alone
    flax, torch                  a layout by name
    in:0,out:1+2,batch:-         axes by number, + joins several, - is none, * all the rest
    conv:32x32x3,strides:2       the convolution itself, of images of this size and channels;
                                 also padding:SAME, dilation:1, groups:1

  jsn audit model.safetensors --rules 'head/weight$=none' 'attn/.*kernel$=in:0,out:1+2,batch:-'

formats:
  .safetensors, .npz, Flax's .msgpack, directories of Orbax. Pickles (.pt, .pth, .bin, .pkl) are
  refused: they can run code.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other failure."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after the name of the program; those of the process if None.

    Returns:
        The exit status.
    """
    parser = _Parser(prog="jsn", description="Spectral normalization for JAX.")
    commands = parser.add_subparsers(required=True, metavar="audit | demo")
    audit = commands.add_parser(
        "audit",
        help="how large are the weights of this checkpoint?",
        description="One row for each weight of a checkpoint: norm, proven bound, rank, condition.",
        epilog=_RULES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument("file", metavar="FILE")
    audit.add_argument("--json", metavar="OUT", help="also write the audit as JSON")
    audit.add_argument("--plot", metavar="PNG", help="also draw norms along depth, and spectra")
    audit.add_argument(
        *("--rules", "--rule"),
        metavar="PATTERN=VIEW",
        nargs="+",
        action="extend",
        default=[],
        type=_rule,
        help="which leaves are weights, and as what; may be repeated",
    )
    audit.set_defaults(run=_audit)
    help_ = "train a small GAN with and without jsn; options are those of examples/demo.py"
    demo = commands.add_parser("demo", help=help_, add_help=False)
    demo.set_defaults(run=_demo)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in any script, on any terminal
    options, options.rest = parser.parse_known_args(argv)
    if options.rest and options.run is _audit:
        audit.error(f"unrecognized arguments: {' '.join(options.rest)}")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return _fail("jsn: interrupted", 130)
    except BrokenPipeError:  # `jsn audit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(line: str, status: int = 1) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return status


# --- audit ------------------------------------------------------------------------------------


def _audit(options: argparse.Namespace) -> int:
    where = f"jsn audit: {shorten(options.file, 400)}:"
    try:
        for out in (options.json, options.plot):
            if out is not None:
                _check_writable(pathlib.Path(out), pathlib.Path(options.file))
        with open_checkpoint(options.file) as checkpoint:
            audit, problems = _read(checkpoint, options)
    except (Unreadable, ImportError) as error:
        return _fail(f"{where} {error}")
    except Exception as error:  # a file can be wrong in a way that nobody thought of
        return _fail(f"{where} cannot be audited: {type(error).__name__}: {error}")
    if not audit.rows and not problems:
        names = ", ".join(shorten(leaf.path) for leaf in audit.left_alone[:8])
        problems = [("", f"no weights among its arrays ({names or 'none'}): see --rules in --help")]
    _show(audit)
    if problems:
        return _fail(f"{where} {_summary(problems)}")
    try:
        if options.plot is not None:
            audit.plot(options.plot)
        if options.json is not None:
            audit.to_json(options.json)
    except (OSError, ValueError, ImportError) as error:
        return _fail(f"{where} audited, but not written: {error}")
    return 0


def _check_writable(path: pathlib.Path, source: pathlib.Path) -> None:
    if not path.parent.is_dir() or path.is_dir():
        raise Unreadable(f"not audited: {path} cannot be written")
    if path.exists() and source.exists() and path.samefile(source):
        raise Unreadable(f"not audited: {path} would be overwritten")


def _read(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[Audit, list[Problem]]:
    with _progress(checkpoint) as progress:
        return audit_entries(checkpoint, options.rules, source=str(options.file), progress=progress)


@contextlib.contextmanager
def _progress(checkpoint: Checkpoint) -> Iterator[Callable[[Entry], None]]:
    """A progress bar, where someone is watching."""
    bar: Any = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich import console, progress

            bar = progress.Progress(
                *progress.Progress.get_default_columns(),
                console=console.Console(stderr=True),
                transient=True,
            )
    if bar is None:
        yield lambda entry: None
        return
    with bar:
        task = bar.add_task("audit", total=sum(entry.nbytes for entry in checkpoint.entries))
        yield lambda entry: bar.advance(task, entry.nbytes)


def _show(audit: Audit) -> None:
    if not audit.rows and not audit.left_alone:
        return
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            Console().print(audit)
            return
    print(audit.table(), flush=True)


def _summary(problems: Sequence[Problem]) -> str:
    """All problems in one line."""
    told = [f"{shorten(path)}: {what}" if path else what for path, what in problems[:3]]
    rest = len(problems) - len(told)
    return "; ".join(told) + (f"; and {rest} more problems" if rest > 0 else "")


def _rule(text: str) -> tuple[str, Any]:
    """A rule of the command line: PATTERN=VIEW.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    pattern, _, view = text.rpartition("=")
    try:
        if not pattern:
            raise ValueError("no PATTERN=")
        named = {"none": None, "flax": FLAX[-1][1], "torch": TORCH[-1][1]}
        return pattern, named[view] if view in named else _view(view)
    except (ValueError, TypeError) as error:
        message = _errors.bad_view(text, str(error))
        raise argparse.ArgumentTypeError(message) from None


def _view(text: str) -> Matrix | Conv:
    """Axes, or a convolution."""
    pairs = [part.partition(":") for part in text.split(",")]
    values = {key: value for key, _, value in pairs}
    if len(values) < len(pairs):
        raise ValueError("a word stands twice")
    if "conv" in values:
        return _conv(values)
    unknown = sorted({*values} - {"in", "out", "batch"})
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))} means nothing")
    axes: dict[str, Any] = {f"{key}_axis": _axes(value) for key, value in values.items()}
    if "in_axis" in axes and "out_axis" not in axes:
        axes["out_axis"] = None
    return Matrix(**axes)


def _axes(text: str) -> tuple[int, ...] | None:
    if text == "*":
        return None
    return () if text == "-" else tuple(int(axis) for axis in text.split("+"))


def _conv(values: dict[str, str]) -> Conv:
    words = {"strides": "strides", "dilation": "kernel_dilation", "groups": "feature_group_count"}
    shape = tuple(int(n) for n in values.pop("conv").split("x"))
    options: dict[str, Any] = {"padding": values.pop("padding", "SAME")}
    for key, value in values.items():
        if key not in words:
            raise ValueError(f"{key!r} means nothing")
        sizes = tuple(int(n) for n in value.split("x"))
        options[words[key]] = sizes[0] if len(sizes) == 1 else sizes
    return Conv(shape, **options)


# --- demo -------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    script = pathlib.Path(__file__).resolve().parent.parent / "examples" / "demo.py"
    if not script.is_file():
        return _fail(
            "jsn demo: the demo is not part of the installed package: clone the repository of jsn "
            "and run `make demo` there"
        )
    return subprocess.run([sys.executable, str(script), *options.rest], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
