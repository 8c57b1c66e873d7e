"""The page of the frontier answers for every structure of the library."""

from __future__ import annotations

from natgrad_flax.structures import STRUCTURES as LIBRARY
from ntk_analysis.reproduce.natgrad.figures_frontier import _MARKS
from ntk_analysis.reproduce.natgrad.frontier_map import STRUCTURES


def test_every_structure_is_on_the_map():
    for cls in LIBRARY:
        assert any(isinstance(one, cls) for one in STRUCTURES.values()), cls.__name__


def test_marks_are_those_of_points():
    assert set(_MARKS) <= set(STRUCTURES)
