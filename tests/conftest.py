"""How every test runs: on the CPU, on eight virtual devices, with strict promotion of ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling: small code, hardly optimized, saves a third of it. What XLA
# makes of a program (operations, bytes, collectives) stays the same; nightly optimizes in full.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        *[
            flag
            for flag in (
                "--xla_force_host_platform_device_count=8",
                "--xla_backend_optimization_level=0",
            )
            if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", "")
        ],
    ]
)

import jax
import pytest

# Broadcasting between ranks is how a missing batch axis goes unnoticed.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Skips the tests marked `gpu` where there is no accelerator."""
    if jax.default_backend() == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
