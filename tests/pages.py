"""Runs the Python of a page of the documentation, block after block, in one namespace."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def run(name: str) -> dict:
    """Executes the page's Python blocks; what they define comes back."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks, f"{name} has no Python"
    names: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names
