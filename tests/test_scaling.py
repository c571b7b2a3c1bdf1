"""What the page on many devices says holds; the benchmark for accelerators runs without one."""

import json

import numpy as np
import pytest

from benchmarks import _report, accelerator, scaling


def assert_formulas_hold(row, rel):
    formulas = row["formulas"]
    assert (row["sent_in"], row["sent_out"]) == (formulas["sent_in"], formulas["sent_out"])
    for kind in ("flops", "bytes"):
        expected = sum(value for name, value in formulas.items() if name.startswith(kind))
        assert row[kind] == pytest.approx(expected, rel=rel)


def test_formulas_agree_with_the_compiler():
    row = scaling.compiled("both", 8, scaling.SMOKE)
    assert row["collectives"] == ["all-reduce"]
    assert_formulas_hold(row, 0.1)  # in a small program the small things weigh more


def test_formulas_agree_with_the_run_that_the_page_shows():
    result = _report.read_json(_report.ROOT / "benchmarks/results/scaling.json")["compiled"]
    (m, n), block = scaling.FULL["shape"], scaling.FULL["block"]
    assert {row["devices"] for row in result["rows"]} == set(scaling.FULL["devices"])
    for row in result["rows"]:
        p, q = scaling.LAYOUTS[row["layout"]](row["devices"])
        assert row["formulas"] == scaling.predicted(m, n, p, q, block)
        assert_formulas_hold(row, 0.05)
    page = (_report.ROOT / "docs/scaling.md").read_text()
    for part in scaling.parts({"compiled": result}).values():
        assert part in page


@pytest.mark.parametrize(("model", "billions"), [("7B", 6.476), ("70B", 68.451)])
def test_plans_are_of_whole_models(model, billions):
    """The parameters of Llama without its embeddings; what grows with W is shared by devices."""
    few, many = (scaling.planned(model, devices, 32) for devices in (8, 64))
    assert few["parameters"] / 1e9 == pytest.approx(billions, rel=1e-3)
    assert few["flops"] > 2 * 40 * few["parameters"] / 8
    assert few["flops"] / 8 < many["flops"] < few["flops"] / 4
    assert few["data_axis"] == 0 < few["model_axis"]
    assert few["small"] == many["small"]


def test_accelerator_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_report, "ROOT", tmp_path)
    accelerator.main(["--smoke"])
    (file,) = (tmp_path / "out/benchmarks/results").glob("accelerator-*.json")
    assert str(file) in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["made"]["platform"] in file.name
    (row,) = result["rows"]
    found = row["block 8"]
    for times in (row["copy"], found["normalize"], found["sigmas"]):
        assert times["rounds"] >= 5
        assert times["ms_median"] > 0
    assert -1e-3 < found["sigma_error"] < 1e-6


def test_accelerator_writes_down_what_is_missing(tmp_path, monkeypatch):
    """Cases too large for a CPU, and those for which no time is left: none is skipped silently."""
    monkeypatch.setattr(_report, "ROOT", tmp_path)
    monkeypatch.setattr(accelerator, "SECONDS", -1)
    accelerator.main([])
    (file,) = (tmp_path / "benchmarks/results").glob("accelerator-*.json")
    rows = {row["case"]: row["missing"] for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == list(accelerator.CASES)
    assert set(rows.values()) == {"no time left", "too large for a CPU"}
    large = [n for n, (shape, k, _) in accelerator.CASES.items() if k * np.prod(shape) > 2**24]
    assert [name for name, why in rows.items() if "CPU" in why] == large
