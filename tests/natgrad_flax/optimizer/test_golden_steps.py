"""Forty steps of every structure in many settings are those of the file, to rounding."""

import pytest
from golden_steps import CELLS, descend, difference, read

CASES = [
    pytest.param(cell, marks=() if name in setting.quick.split() else pytest.mark.slow, id=cell)
    for cell, (name, setting) in CELLS.items()
]


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore::natgrad_flax.SingularCouplingWarning")
@pytest.mark.parametrize("cell", CASES)
def test_forty_steps(cell):
    assert difference(descend(cell), read()[cell]) < 1e-10


def test_the_file_holds_these_cells_and_no_others():
    assert list(read()) == list(CELLS)
