"""Faults in a training run: the norms are true again within twenty steps, and nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from matrices import true_norm

import jsn
from benchmarks.reliability import faults
from benchmarks.reliability.faults import FAULTS, Fault

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
KNOWN = {
    "blocks 1e30 times as large": "the Gram matrix of the block overflows",
    "blocks 1e-30 times as large": "the Gram matrix of the block underflows",
    "one entry of each block is 1e30": "the Gram matrix of the block overflows",
}


def test_a_healthy_run_is_true():
    nothing = Fault("nothing", "weight", lambda carry: carry)
    outcome = faults.strike(nothing, after=10)
    assert outcome.steps == 0
    assert outcome.worst < 1e-5


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_norms_are_true_within_twenty_steps(fault, request):
    if fault.name in KNOWN:
        request.applymarker(pytest.mark.xfail(reason=KNOWN[fault.name]))
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
