"""How every test runs: on the CPU, on eight virtual devices, with strict promotion of ranks."""

import importlib
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    devices = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()

import jax
import pytest

from jsn import _plan

# Broadcasting between ranks is how a missing batch axis goes unnoticed.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Skips the tests marked `gpu` where there is no accelerator."""
    if jax.default_backend() == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs with the file that needed them.

    Each of them holds memory maps, of which Linux grants a process 65530: XLA aborts beyond.
    """
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()


@pytest.fixture(scope="module")
def together():
    """Weights of one shape share their thin operations, however few: as on an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "_many", lambda: 2)
        yield


@pytest.fixture
def load(monkeypatch):
    """Imports modules of the examples, which see each other as scripts do."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "examples"))
    return importlib.import_module
