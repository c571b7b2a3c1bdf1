"""Faults in a training run: the norms are true again within twenty steps, and nothing is lost."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from matrices import true_norm

import jsn
from benchmarks.reliability import _page, faults, fuzz, kills, soak
from benchmarks.reliability.faults import FAULTS, Fault

pytestmark = pytest.mark.slow  # minutes in all; what they promise is also tested in the small

HARMLESS = {
    "a NaN in one gradient",
    "an infinity in one gradient",
    "one weight 1e6 times as large",
    "all weights 1e30 times as large",
    "all weights 1e-30 times as large",
    "all signs turn",
    "the top direction dies",
}
"""What the norms do not even notice. Every other fault has to be seen, or it was none."""


def test_a_healthy_run_is_true():
    nothing = Fault("nothing", "weight", lambda carry: carry)
    outcome = faults.strike(nothing, after=10)
    assert outcome.steps == 0
    assert outcome.worst < 1e-5


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_norms_are_true_within_twenty_steps(fault):
    outcome = faults.strike(fault, after=25)
    assert outcome.steps is not None
    assert outcome.steps <= 20
    assert outcome.finite
    assert (outcome.worst > 1e-5) == (fault.name not in HARMLESS)


def test_a_fault_that_stays_is_seen():
    """The measure can say no: a weight that is not finite stays wrong."""
    bad = faults._weights(lambda x: x.at[..., 0].set(np.nan), "dense")
    assert faults.strike(Fault("stays", "weight", bad), after=3).steps is None


# --- states from elsewhere ----------------------------------------------------------------------


normalize = jax.jit(jsn.normalize)
sigmas = jax.jit(jsn.sigmas)


def test_a_state_of_another_block_size_goes_on_or_is_refused():
    """As it is, it stays what it is, and true; restored into another size, it is refused."""
    carry = faults.healthy()
    other = state = jsn.init(carry.params, rules=faults.RULES, block_size=5)
    for _ in range(50):
        normalized, state = normalize(carry.params, state)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, other)
    assert faults.distance(normalized) < 1e-3
    saved = serialization.to_bytes(other)
    with pytest.raises(ValueError, match=r"dense/kernel: found shape .*, expected shape"):
        serialization.from_bytes(carry.state, saved)


def test_a_state_of_other_shapes_is_refused_with_all_its_leaves():
    carry = faults.healthy()
    smaller = jax.tree.map(lambda W: W[..., :-1], carry.params)
    with pytest.raises(ValueError, match="does not fit these parameters") as error:
        normalize(smaller, carry.state)
    assert all(f"{name}/kernel: shape" in str(error.value) for name in faults.SHAPES)


def test_states_averaged_over_an_ensemble_are_states():
    """As where parameters are averaged: the mean of five states tracks the mean weights."""
    runs = [faults.start(seed) for seed in range(5)]
    params, state = (
        jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)
        for trees in ([run.params for run in runs], [run.state for run in runs])
    )
    for _ in range(20):
        normalized, state = normalize(params, state)
    assert faults.distance(normalized) < faults.TOLERANCE


def test_evaluation_with_a_broken_state_shows_in_sigma_and_never_exceeds_the_truth():
    """Without a step (`n_steps=0`) nothing is repaired, and a wrong sigma is too small, not NaN."""
    carry = faults.healthy()
    truth = true_norm(carry.params["dense"]["kernel"])
    for change in (lambda u: u * jnp.nan, jnp.zeros_like, jnp.ones_like, lambda u: u[..., ::-1]):
        state = jax.tree.map(change, carry.state)
        sigma = float(sigmas(carry.params, state)["dense"]["kernel"])
        assert 0 <= sigma <= truth * (1 + 1e-6)


# --- the program behind `make reliability` ------------------------------------------------------

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_shows_what_is_stored():
    stored = json.loads((ROOT / "benchmarks/results/reliability.json").read_text())
    page = (ROOT / "docs/reliability.md").read_text()
    for name, part in _page.parts(stored).items():
        assert f"<!-- reliability: {name} -->\n{part}\n<!-- end -->" in page


def test_a_failure_would_be_on_the_page():
    made = {"date": "2026-01-02", "jsn": "abc", "cores": 1}
    made |= {"versions": {"python": "3", "jax": "1", "flax": "1"}}
    fault = {"where": "state", "fault": "blocks", "worst": None, "steps": None, "finite": False}
    good = fault | {"worst": 0.1, "steps": 3, "finite": True}
    counts = {"inputs": 9, "read": 1, "told": 7, "crashes": 1, "code_ran": True}
    row = {"step": 4, "worst": 1.5, "memory_mib": 9.0, "arrays": 1, "traces": 2, "finite": False}
    killed = {"steps": 9, "kills": 3, "resumes": 3, "resumed": 2, "equal": False}
    parts = _page.parts(
        {
            "faults": {"made": made, "rows": [fault, good]},
            "fuzz": {
                "made": made,
                "rows": [{"input": "npz", "peak_mib": 1, "longest_s": 1, **counts}],
            },
            "kills": {"made": made, "while_starting": 0, "while_writing": 1, **killed},
            "soak": {"made": made, "steps": 4, "every": 1, "rows": [row] * 4},
        }
    )
    assert "2 faults injected, 1 recovered" in parts["faults"]
    assert "| state: blocks | not finite | never |" in parts["faults"]
    assert "9 inputs fuzzed, 1 crashes, code from a file ran 1 times" in parts["fuzz"]
    assert "2 of 3 resumes" in parts["kills"]
    assert "NOT equal" in parts["kills"]
    assert "4 steps, 2 traces, NOT all finite" in parts["soak"]
    assert "5.0e-01 from the bound" in parts["soak"]
    assert parts["modes"].startswith("Not measured yet")


def test_kill_nine_loses_no_step():
    found = kills.run(4)
    assert found["equal"]
    assert found["resumed"] == found["resumes"]


def test_a_short_soak():
    rows = soak.run(600, 100)["rows"]
    assert len(rows) == 6
    assert all(row["finite"] and row["traces"] == 1 for row in rows)
    assert max(abs(row["worst"] - 1) for row in rows) < 1e-3
    assert rows[-1]["arrays"] == rows[0]["arrays"]
    assert rows[-1]["memory_mib"] - rows[0]["memory_mib"] < 32


@pytest.mark.filterwarnings("ignore")  # of orbax
def test_nothing_crashes_in_the_fuzzing_of_the_page():
    for row in fuzz.run(20):
        assert row["crashes"] == row["code_ran"] == 0
        assert row["told"] > 0
