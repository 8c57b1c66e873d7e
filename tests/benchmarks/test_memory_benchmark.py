"""The search for the largest size that fits, and the bytes that it asks for."""

from collections.abc import Callable

import pytest

from benchmarks import memory, programs
from benchmarks.memory import GRID, largest, step_bytes
from benchmarks.problems import STRUCTURES, make_problem


@pytest.mark.parametrize("start", [3, 100, 5000])
@pytest.mark.parametrize(
    "bytes_of",
    [
        lambda size: 1000 * size,
        lambda size: 10**6 + 12 * size**2,
        lambda size: 10**7 + 20 * size + size**3,
        lambda size: 10**8 + size,
    ],
    ids=["linear", "quadratic", "cubic", "flat"],
)
def test_largest_fits_and_the_next_of_the_grid_does_not(
    bytes_of: Callable[[int], int], start: int
) -> None:
    asked = []

    def counted(size: int) -> int:
        asked.append(size)
        return bytes_of(size)

    budget = 2**27
    size, found, count = largest(counted, start, budget)
    assert found == bytes_of(size) <= budget
    assert bytes_of(round(size * GRID * 1.01) + 1) > budget
    assert count == len(asked) == len(set(asked)) <= 20


def test_a_budget_below_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match="size 1 needs 1001"):
        largest(lambda size: 1000 + size, 64, 500)


def test_steps_are_planned_without_running_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BASE", memory.Case(width=16, depth=3, samples=8, outputs=3))
    small, large = (step_bytes("exact", "samples", size) for size in (8, 64))
    sgd = step_bytes(memory.SGD, "samples", 64)
    assert small < large
    assert sgd < large
    # the plan is that of the step which the other suites time
    line, entry = memory.Case(16, 3, 8, 3).line(), STRUCTURES["exact"]
    compiled, _ = programs.compile_natural(line, entry, make_problem(line, entry))
    assert small == programs.planned_bytes(compiled)
    # twice the parameters, and the batch
    assert sgd >= 4 * (2 * (784 * 16 + 16 * 16 + 16 * 3) + 64 * (784 + 3))
    monkeypatch.setattr(memory, "planned_bytes", lambda compiled: 10)
    with pytest.raises(ArithmeticError, match="arguments and results take"):
        step_bytes(memory.SGD, "samples", 8)


def test_figures_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "step_bytes", lambda structure, what, size: 10_000 * size)
    monkeypatch.setattr(memory, "BUDGET", 10**7)
    found = memory.Memory().measure("exact", "samples")
    assert 900 <= found["size"] <= 1000
    assert found["bytes"] == 10_000 * found["size"]
    monkeypatch.setattr(memory, "SLOW", {"unit-wise": "too slow to compile"})
    assert memory.Memory().skipped("unit-wise", "width") == "too slow to compile"
    assert memory.Memory().skipped("exact", "width") is None
    monkeypatch.setattr(memory, "BUDGET", 2**70)
    assert "less memory than the budget" in str(memory.Memory().skipped("exact", "width"))
