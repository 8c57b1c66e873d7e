"""The benchmark of growth: exponents of known laws, and theory from the same sizes."""

import pytest

from benchmarks import growth
from benchmarks.problems import STRUCTURES, Case


def test_exponent_of_a_power_law() -> None:
    sizes = (3, 10, 40)
    assert growth.exponent(sizes, [7.0 * size**2.5 for size in sizes]) == pytest.approx(2.5)
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ArithmeticError, match="no power law"):
            growth.exponent((1, 2), (1.0, bad))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_theory_has_a_count_for_every_structure(structure: str) -> None:
    flops = [growth.theoretical_flops(structure, Case(64, depth, 8, 2)) for depth in (3, 6)]
    assert 0 < flops[0] < flops[1]


def test_theory_reaches_the_leading_power() -> None:
    def slope(name: str, *values: int, width: int = 8) -> float:
        base = {"width": width, "depth": 3, "samples": 8, "outputs": 2}
        counts = [
            growth.theoretical_flops("exact", Case(**(base | {name: value}))) for value in values
        ]
        return growth.exponent(values, counts)

    # the Cholesky factorisation of N C x N C; with fewer parameters than that, J^T J
    assert slope("samples", 10**6, 10**7, width=8000) == pytest.approx(3, abs=0.02)
    assert slope("samples", 10**5, 10**6) == pytest.approx(1, abs=0.01)
    # the product of two wide layers, and every layer beside the inputs
    assert slope("width", 10**5, 10**6) == pytest.approx(2, abs=0.01)
    assert slope("depth", 100, 300) == pytest.approx(1, abs=0.15)


def test_figures_come_from_the_sizes_of_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "BASE", Case(8, 3, 4, 2, "mse"))
    monkeypatch.setattr(growth, "SIZES", {"samples": (4, 16)})
    monkeypatch.setattr(growth, "REPEATS", 1)
    found = growth.Growth().measure("exact", "samples")
    counts = [growth.theoretical_flops("exact", Case(8, 3, n, 2, "mse")) for n in (4, 16)]
    assert found["theory"] == pytest.approx(growth.exponent((4, 16), counts), abs=1e-3)
    assert found["flops"] > 0
    assert found["largest"] > 0


def test_steps_are_damped_for_every_structure() -> None:
    case = Case(8, 3, 4, 2, "mse")
    assert case.line().undamped
    assert not growth.damped(case).undamped
    assert growth.damped(case).widths == (784, 8, 8, 2)
