"""The README keeps its word: its Python runs, and what it links to is there."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_examples_run_and_their_assertions_hold():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert "assert " in blocks[0]
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    variables = names["variables"]
    real, fake = jnp.ones((2, 256)), jnp.zeros((2, 256))
    loss = jax.value_and_grad(names["loss"], has_aux=True)
    (value, state), _ = loss(variables["params"], variables["sn_state"], real, fake)
    assert jnp.isfinite(value)
    assert jax.tree.structure(state) == jax.tree.structure(variables["sn_state"])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w/.]+)\)", TEXT))))
def test_what_the_readme_links_to_exists(path):
    assert (ROOT / path).exists()


def test_the_pyproject_floors_are_those_of_the_readme():
    pyproject = (ROOT / "pyproject.toml").read_text()
    python, jax_floor, flax_floor = re.search(
        r"Python (\d+\.\d+) and newer, JAX (\d+\.\d+)\.\d+ to [\d.]+, Flax (\d+\.\d+)", TEXT
    ).groups()
    assert f'requires-python = ">={python}"' in pyproject
    assert f'"jax>={jax_floor}' in pyproject
    assert f'"flax>={flax_floor}' in pyproject


def test_the_table_of_the_demo_is_that_of_the_stored_run():
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    plain, with_jsn = result["rows"]
    for layer, norm in plain["norms"].items():
        assert f"| true norm of {layer} | {norm:.4f} | {with_jsn['norms'][layer]:.4f} |" in TEXT
    for run, other in ((plain, with_jsn), (with_jsn, plain)):
        best = "**" if run["frechet"] < other["frechet"] else ""
        assert f"| {best}{run['frechet']:.1f}{best} |" in TEXT
