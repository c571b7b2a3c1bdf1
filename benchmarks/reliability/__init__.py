"""What a training run of weeks meets: faults, hostile files, kills, long soaks, modes of JAX.

    python -m benchmarks.reliability                      everything, and the page
    python -m benchmarks.reliability --only faults        one part
    python -m benchmarks.reliability --only soak --soak-steps 2000

Each part measures; `_page` writes `docs/reliability.md`, with the sizes that were really run.
"""
