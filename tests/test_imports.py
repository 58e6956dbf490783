"""Imports go one way, and importing longspan loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import longspan as ls

ROOT = Path(ls.__file__).parent

# A package may import those on its left, itself, and the modules beside the packages.
LAYERS = [
    ["_lazy", "errors"],
    ["pattern"],
    ["planning"],
    ["analysis"],
    ["ops"],
    ["mechanism", "select", "position", "kv", "parallel", "nn"],
    ["hf"],
    ["data", "train", "eval", "bench", "viz"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def imported(path):
    """Full names of all modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "longspan" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[own], f"{own} must not import {name}"
        if parts[0] in ("transformers", "peft"):
            assert own == "hf", f"only longspan.hf may import {parts[0]}"
        if own == "ops" and path.parent.name == "kernels" and name.startswith("longspan.ops."):
            family = path.stem.lstrip("_").split("_")[0]
            kernels = {p.stem for p in path.parent.glob("[a-z]*.py")}
            other = {part.lstrip("_").split("_")[0] for part in parts[3:4]} & kernels
            assert other <= {family}, f"kernels must not import each other: {path.name}, {name}"


def fresh(code):
    """Run code in a fresh process; its output, and the seconds it took."""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip(), time.perf_counter() - start


def test_importing_longspan_loads_nothing_heavy():
    heavy = ["torch", "numpy", "transformers", "peft", "matplotlib", "typer", "rich"]
    out, _ = fresh(f"import sys, longspan; print([m for m in {heavy} if m in sys.modules])")
    assert out == "[]"


def test_patterns_and_plans_need_no_torch():
    out, _ = fresh(
        "import sys, longspan as ls; ls.plan(ls.parse('scca.flow(8) | sink(1)'), 64, heads=4);"
        "print('torch' in sys.modules)"
    )
    assert out == "False"


def test_the_public_surface_is_sorted_and_complete():
    names = list(ls.__all__)
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for name in names:
        assert getattr(ls, name) is not None


@pytest.mark.parametrize(
    "package", [ls, ls.hf, ls.mechanism, ls.parallel, ls.select], ids=lambda p: p.__name__
)
def test_names_that_are_looked_up_late(package):
    assert set(package._HOME) == set(package.__all__)
    assert dir(package) == sorted(package.__all__)
    for name in package.__all__:
        found = getattr(package, name)
        assert vars(package)[name] is found
        assert package._HOME[name] == "" or found.__module__.startswith("longspan.")
    with pytest.raises(
        AttributeError, match=rf"^module '{package.__name__}' has no attribute 'nothing'$"
    ):
        _ = package.nothing
