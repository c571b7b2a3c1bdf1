"""What a result must carry, and how it gets into a page: machine, versions, JSON, markers.

In: rows. Out: `benchmarks/results/NAME.json`, and pages with generated parts between
`<!-- NAME: part -->` and `<!-- end -->`. Must not know what was measured.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")

ONE_THREAD = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment of the processes that measure: one core each, so that they do not share any."""


def circumstances() -> dict[str, Any]:
    """When, where and with what: to be stored beside every measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "jsn": _commit(),
        "environment": {name: os.environ[name] for name in ONE_THREAD if name in os.environ},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _commit() -> str:
    """The commit of jsn, with a + if files of the package have changed since."""
    try:
        git = lambda *words: subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = git("status", "--porcelain", "--", "jsn/_*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def read_json(path: Path) -> dict[str, Any]:
    """A stored result, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Stores a result, one line for each row, so that differences can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    flat = lambda match: re.sub(r"\s*\n\s*", " ", match[0]).replace("{ ", "{").replace(" }", "}")
    path.write_text(re.sub(r"^   \{\n.*?^   \}", flat, text, flags=re.M | re.S) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, with the first column left and the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_parts(page: Path, name: str, parts: Mapping[str, str], template: Path) -> None:
    """Renews the generated parts of a page; the words between them are those of the template.

    Raises:
        ValueError: If the page has no place for a part.
    """
    text = template.read_text()
    for part, content in parts.items():
        begin, end = f"<!-- {name}: {part} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{template}: no part '{begin} ... {end}'")
        text = pattern.sub(lambda _, new=f"{begin}\n{content}\n{end}": new, text)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
