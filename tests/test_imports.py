"""Imports run one way, down the flow: a station never knows the ones after it."""

import ast
import importlib.util
import pathlib

import pytest

FLOW = [
    "_types", "_errors", "_operator", "_rules", "_block", "_power", "_plan", "_constrain",
    "_normalize", "linen",
]  # fmt: skip
PACKAGE = pathlib.Path(importlib.util.find_spec("jsn").origin).parent


def imported(source: str) -> set[str]:
    """The jsn modules that a module's source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name.split(".")[1] for name in found if name.startswith("jsn.")}


def upstream(station: str, source: str) -> set[str]:
    """The stations that a module imports although they come after it, or are it."""
    return imported(source) & set(FLOW[FLOW.index(station) :])


@pytest.mark.parametrize("station", FLOW)
def test_a_station_imports_only_earlier_ones(station):
    assert not upstream(station, (PACKAGE / f"{station}.py").read_text())


def test_the_check_sees_each_way_of_importing():
    for line in ("import jsn._plan", "from jsn import _plan", "from jsn._plan import track"):
        assert upstream("_power", f"def f():\n    {line}") == {"_plan"}
        assert not upstream("_normalize", line)


@pytest.mark.parametrize("station", FLOW)
def test_a_module_opens_with_its_station(station):
    text = ast.get_docstring(ast.parse((PACKAGE / f"{station}.py").read_text()))
    assert "In:" in text
    assert "Out:" in text
    assert "ust not know" in text
