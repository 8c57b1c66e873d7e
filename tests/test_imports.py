"""Imports make no circle: arrows of ARCHITECTURE point down, also those inside of functions."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {
    "natgrad_datasets": ROOT / "datasets",
    **dict.fromkeys(("natgrad_flax", "ntk_analysis", "benchmarks"), ROOT),
}
FILES = {
    ".".join(file.relative_to(place).with_suffix("").parts).removesuffix(".__init__"): file
    for name, place in PLACES.items()
    for file in (place / name).rglob("*.py")
}


def imported(module):
    """The modules that a module imports, at its top, in functions and for types alone."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            source = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else source for name in names)


@pytest.fixture(scope="module")
def graph():
    return {module: {name for name in imported(module) if name in FILES} for module in FILES}


def test_no_imports_make_a_circle(graph):
    TopologicalSorter(graph).prepare()


def test_one_arrow_up_makes_a_circle(graph):
    upwards = {**graph, "benchmarks.leaderboard.lanes": {"benchmarks.leaderboard.runner"}}
    with pytest.raises(CycleError):
        TopologicalSorter(upwards).prepare()
