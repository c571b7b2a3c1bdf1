"""The versions that pyproject.toml promises are those that are named, installed and tested."""

import importlib.metadata
import pathlib
import platform
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import jsn

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def floors(lines) -> dict[str, Version]:
    """The lower bound of each requirement."""
    found = {}
    for requirement in map(Requirement, lines):
        (specifier,) = requirement.specifier
        assert specifier.operator == ">=", requirement
        found[requirement.name] = Version(specifier.version)
    return found


FLOORS = floors(PROJECT["dependencies"])
PYTHON = Version(PROJECT["requires-python"].removeprefix(">="))


def text(name: str) -> str:
    return (ROOT / name).read_text()


def named(name: str, pattern: str) -> list[Version]:
    """All versions that a file names in this way; it has to name one."""
    found = [Version(version) for version in re.findall(pattern, text(name))]
    assert found, f"{name} names no version as {pattern}"
    return found


def test_the_oldest_environment_pins_every_floor():
    lines = [line for line in text("requirements/oldest.txt").splitlines() if line[:1] != "#"]
    pins = {Requirement(line).name: Requirement(line).specifier for line in lines if line}
    assert all(len(pin) == 1 and next(iter(pin)).operator == "==" for pin in pins.values())
    pinned = {name: Version(next(iter(pin)).version) for name, pin in pins.items()}
    assert pinned.pop("jaxlib") == pinned["jax"]
    assert pinned == FLOORS


@pytest.mark.parametrize(
    ("package", "word"), [("jax", "JAX"), ("flax", "Flax")], ids=lambda value: value
)
def test_readme_and_changelog_name_the_floors(package, word):
    floor = FLOORS[package]
    readme = re.search(rf"{word} (\d[\d.]*\d)(?: to (\d[\d.]*\d))?", text("README.md"))
    assert readme, f"README.md names no version of {word}"
    oldest = Version(readme[1])
    assert oldest.release == floor.release[: len(oldest.release)]
    assert Version(readme[2] or readme[1]) >= oldest
    assert named("CHANGELOG.md", rf"Oldest supported versions: .*{word} (\d[\d.]*\d)")[0] == floor


def test_python_is_named_alike_everywhere():
    assert set(named("README.md", r"Python (3\.\d+)")) == {PYTHON}
    assert named("CHANGELOG.md", r"Oldest supported versions: Python (3\.\d+)")[0] == PYTHON
    assert min(named("Makefile", r"find_python\.sh (3\.\d+)")) == PYTHON
    assert named("scripts/find_python.sh", r"python(3\.\d+)")[0] == PYTHON
    classified = [
        Version(line.rsplit(" :: ", 1)[1])
        for line in PROJECT["classifiers"]
        if re.search(r":: Python :: 3\.\d+$", line)
    ]
    assert min(classified) == PYTHON
    tools = tomllib.loads(text("pyproject.toml"))["tool"]
    assert tools["ruff"]["target-version"] == f"py{PYTHON.major}{PYTHON.minor}"
    assert Version(tools["pyright"]["pythonVersion"]) == PYTHON


def test_ci_tests_the_oldest_and_the_newest():
    """Every change runs `make test`, and every night what `make nightly` adds to it."""
    assert re.search(r"^section make (test|suite)", text(".ci/run"), re.MULTILINE)
    nightly = re.search(r"^nightly:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)
    assert nightly
    assert {"x64", "oldest", "newest"} <= {*nightly[1].split()}
    oldest = re.search(r"\.venv-oldest/\.has-%:.*\n.*", text("Makefile"))
    assert oldest
    assert "--constraint requirements/oldest.txt" in oldest[0]


def test_what_is_installed_is_supported():
    assert Version(platform.python_version()) >= PYTHON
    for package, floor in FLOORS.items():
        assert Version(importlib.metadata.version(package)) >= floor
    assert importlib.metadata.version("jsn") == jsn.__version__


def test_a_floor_that_moves_alone_is_seen():
    """The reading of floors sees a difference, and refuses what is no floor."""
    assert floors(["jax>=0.9"]) != {"jax": FLOORS["jax"]}
    with pytest.raises(AssertionError):
        floors(["jax==0.8.0"])
