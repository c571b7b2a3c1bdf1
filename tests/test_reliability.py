"""What `make reliability` makes of its results: coverage, and which mode runs where."""

import pathlib
import re

from benchmarks.reliability import _page, coverage, modes

JSN = pathlib.Path(__file__).parents[1] / "jsn"
FILE = {
    "summary": {
        "num_statements": 40,
        "covered_lines": 38,
        "num_branches": 8,
        "covered_branches": 7,
        "excluded_lines": 3,
    },
    "missing_lines": [7, 9],
    "missing_branches": [[6, 9], [12, -1]],
}


def test_coverage_is_told_in_per_cent_and_line_by_line():
    whole = FILE["summary"] | {"covered_lines": 40, "covered_branches": 8}
    rows = [
        coverage._row("jsn/a.py", FILE),
        coverage._row("jsn/b.py", {"summary": whole, "missing_lines": [], "missing_branches": []}),
    ]
    text = _page._coverage({"rows": rows})
    assert "97.5 % of 80 lines and 93.8 % of 16 branches" in text
    assert "6 lines that are for type checkers" in text
    assert "| `jsn/a.py` | 95.0 | 87.5 | 7, 9 | 6 to 9, 12 to the end |" in text
    assert "jsn/b.py" not in text


def test_what_is_left_out_of_coverage_has_its_reason_beside_it():
    for file in JSN.rglob("*.py"):
        for line in file.read_text().splitlines():
            if "no cover" in line:
                assert re.search(r"# pragma: no cover - \w+ \w+", line), f"{file}: {line}"


def test_every_mode_runs_on_the_development_versions_and_the_default_everywhere():
    here, *elsewhere = modes.ENVIRONMENTS
    assert modes.chosen(here, None) == list(modes.MODES)
    for environment in elsewhere:
        assert [mode.name for mode in modes.chosen(environment, None)] == ["default"]
    assert [mode.name for mode in modes.chosen(here, ["jax_debug_nans"])] == ["jax_debug_nans"]


def test_a_mode_leaves_tests_out_only_with_a_reason():
    assert all(bool(mode.without) == bool(mode.why) for mode in modes.MODES)


def test_a_mode_that_is_run_again_takes_the_place_of_its_row():
    row = lambda mode, passed: {"versions": "JAX 1", "mode": mode, "passed": passed}
    stored = [row("default", 1), row("x64", 2)]
    again = modes.merged(stored, [row("default", 3), row("new", 4)])
    assert again == [row("default", 3), row("x64", 2), row("new", 4)]


def test_each_mode_says_with_which_version_of_jsn_it_ran():
    row = {"versions": "JAX 1", "passed": 5, "failed": 0, "seconds": 7}
    rows = [row | {"mode": "default", "jsn": "abc"}, row | {"mode": "x64", "jsn": "def"}]
    text = _page._modes({"rows": rows, "tests": ["tests/a.py"]})
    assert "| JAX 1: `default` | 5 | 0 | 7 | abc |" in text
    assert "| JAX 1: `x64` | 5 | 0 | 7 | def |" in text
