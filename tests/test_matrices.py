"""The table of matrices is what it says it is: names, tags, shapes and singular values."""

import numpy as np
import pytest
from matrices import PROBLEMS, TAGS, assert_converged, named, tagged, true_norm

WANTED = {
    *("gap", "no_gap", "near_tie", "rank_one", "rank_deficient", "zero", "ill_scaled", "one_by_n"),
    *("tall", "wide", "orthogonal", "decaying", "gaussian"),
}


def spectrum(problem):
    return np.linalg.svd(problem.W.astype(np.float64), compute_uv=False)


def test_every_kind_of_matrix_is_there_once_under_its_name():
    assert TAGS >= WANTED
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS)
    assert named("wide").tag == "wide"
    with pytest.raises(KeyError, match="no_such_tag"):
        tagged("gap", "no_such_tag")


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_sigma_is_the_float64_svd(problem):
    assert problem.W.dtype == np.float32
    assert np.isclose(problem.sigma, spectrum(problem)[0], rtol=2e-7, atol=0)
    assert np.isclose(problem.sigma, true_norm(problem.W), rtol=2e-7, atol=0)


def ratio(problem):
    s = spectrum(problem)
    return s[1] / s[0]


TRUE_OF_A_TAG = {
    "gap": lambda p: ratio(p) <= 0.96,
    "no_gap": lambda p: 0.99 <= ratio(p) < 1 or p.name == "nilpotent",
    "near_tie": lambda p: ratio(p) >= 1 - 1.1e-5,
    "rank_one": lambda p: ratio(p) < 1e-6,
    "rank_deficient": lambda p: spectrum(p)[2] < 1e-6 * p.sigma,
    "zero": lambda p: not p.W.any(),
    "ill_scaled": lambda p: abs(np.log10(p.sigma)) >= 8,
    "one_by_n": lambda p: 1 in p.W.shape,
    "tall": lambda p: p.W.shape[0] > 20 * p.W.shape[1],
    "wide": lambda p: p.W.shape[1] > 20 * p.W.shape[0],
    "orthogonal": lambda p: np.ptp(spectrum(p)) < 1e-6 * p.sigma,
    "decaying": lambda p: spectrum(p)[-1] < 0.1 * p.sigma,
    "gaussian": lambda p: 0.9 < p.W.std() < 1.1 and abs(p.W.mean()) < 0.05,
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_a_tag_tells_the_truth(problem):
    assert TRUE_OF_A_TAG[problem.tag](problem)


def test_the_oracle_knows_which_axes_are_inputs():
    W = np.stack([np.eye(3), np.eye(3)])
    assert np.isclose(true_norm(W), np.sqrt(2))  # as (6, 3): two identities on top of each other
    assert np.isclose(true_norm(W, in_axes=1), np.sqrt(6))  # as (2, 9): twice the same row


@pytest.mark.parametrize("estimate", [1.0 + 2e-6, 1.0 - 2e-3, np.nan])
def test_assert_converged_can_fail(estimate):
    with pytest.raises(AssertionError):
        assert_converged(estimate, 1.0, rtol=1e-3)
