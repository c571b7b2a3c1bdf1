"""`python -m benchmarks [NAME ...] [options of the benchmark]`: all of them without a name."""

import argparse
import importlib

BENCHMARKS = {
    "truth": "how true the norms are during training, for each block size, and at what cost",
    "speed": "what normalizing costs, beside every other implementation, and how it grows",
    "one_read": "whether reading a large weight once, a few rows at a time, beats reading it twice",
    "precision": "how precise sigma is: on weights at rest, on moving ones, in low precision",
    "conv_norms": "how far the norm of a reshaped kernel is from that of its convolution",
    "bounds": "how close proven bounds are, and what they cost beside an SVD",
    "scaling": "what a step costs on many devices: formulas, beside compiled programs",
    "accelerator": "what a step costs on whatever device JAX finds; to be run by itself",
}
"""Modules of this package with a `main(argv)`, in the order in which they run."""


def main() -> None:
    listing = "\n".join(f"  {name:11} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"benchmarks:\n{listing}",
        epilog="Options after the names go to each benchmark: try `truth --help`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("name", nargs="*", help="which ones to run, default: all")
    args, rest = parser.parse_known_args()
    unknown = [name for name in args.name if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    if not args.name and {"-h", "--help"} & set(rest):
        parser.print_help()
        return
    for name in args.name or BENCHMARKS:
        importlib.import_module(f"benchmarks.{name}").main(rest)


if __name__ == "__main__":
    main()
