"""Benchmarks: what jsn's promises are worth, measured beside other implementations.

`python -m benchmarks NAME [--smoke]`, or `make bench ARGS="NAME"`. Each benchmark is a module
with a `main(argv)`; `__main__` lists them. Results are kept in `benchmarks/results`, and the pages
of the documentation that quote them are written by the same scripts, never by hand.
"""
