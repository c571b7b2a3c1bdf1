"""The gallery: every example proves its claim in small, and every page says what was measured."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py") if "_gallery" in path.read_text())
STORED = [name for name in NAMES if (ROOT / f"benchmarks/results/gallery/{name}.json").exists()]

pytest.importorskip("sklearn")
pytest.importorskip("rich")


SLOW = ("gan_stability", "long_memory", "residual_flow", "robust_digits")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in NAMES]
)
def test_smoke_asserts_the_claim_and_draws(name, tmp_path):
    command = [sys.executable, f"examples/{name}.py", "--smoke", "--out", str(tmp_path)]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    env = {**os.environ, **quick}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| --- |" in done.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", STORED)
def test_page_says_what_was_measured(name, load):
    stored = json.loads((ROOT / f"benchmarks/results/gallery/{name}.json").read_text())
    example = load(name)
    example.check(stored["result"])
    page = (ROOT / f"docs/gallery/{name}.md").read_text()
    index = (ROOT / "docs/gallery/index.md").read_text()
    for part, text in example.parts(stored["result"]).items():
        assert text in (index if part == "headline" else page), f"{name}: {part} is out of date"
    assert stored["made"]["date"][:10] in page


@pytest.mark.parametrize(
    ("chosen", "peer"),
    [
        (0, nn.InstanceNorm(epsilon=1e-5)),
        (1, nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=-1)),
        (2, nn.BatchNorm(use_running_average=False)),
    ],
    ids=["instance", "layer", "batch"],
)
def test_switchable_norm_is_each_of_the_three_where_it_has_chosen(chosen, peer, load):
    model = load("_switchable_norm").SwitchableNorm()
    x = (
        3
        + 2
        * jax.random.normal(jax.random.key(0), (4, 5, 6, 3))
        * jnp.arange(1.0, 4)[None, None, None]
    )
    params = model.init(jax.random.key(1), x)["params"]
    weight = 100.0 * jax.nn.one_hot(chosen, 3)
    mine = model.apply({"params": {**params, "mean_weight": weight, "var_weight": weight}}, x)
    theirs = functools.partial(peer.apply, mutable=["batch_stats"])
    np.testing.assert_allclose(mine, theirs(peer.init(jax.random.key(1), x), x)[0], atol=2e-5)


def test_spread_counts_what_diverged(load):
    spread = load("_gallery").spread
    assert spread([2.0]) == "2"
    assert spread([1.0, 2.0, 4.0]) == "2 (1 – 4)"
    assert spread([1.0, None, 3.0]) == "2 (1 – 3), 1 of 3 diverged"
    assert spread([np.nan, np.inf]) == "diverged"
