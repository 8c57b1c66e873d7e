"""The diagnosis of resonance: what linear theory says of a cycle of batches, and trials of it."""

from functools import reduce
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.leaderboard.trial import batches, configuration, execute
from benchmarks.leaderboard.workload import find_workload

WORKLOAD = find_workload("diagnosis-resonance")
MOMENTUM, RATE = 0.9, 30.0
"""Of the contestant ``momentum``, and one of the learning rates that it tries, as ``sgd`` does."""

Matrix = NDArray[np.float64]


def curvatures() -> list[Matrix]:
    """Rate times the Hessian of each batch of a cycle, in the order of the harness."""
    x = WORKLOAD.data().x_train.astype(np.float64)
    size = WORKLOAD.batch_size
    assert size
    # f = sqrt(weight variance / fan-in) w.x, and the loss is |f - y|^2 / (2 N)
    scale = RATE * WORKLOAD.model(0).layers[0].weight_variance / x.shape[1]
    rows = islice(batches(WORKLOAD, 0), len(x) // size)
    return [scale * x[row].T @ x[row] / size for row in rows]


def step(curvature: Matrix, momentum: float, *, nesterov: bool = False) -> Matrix:
    """One step as a matrix on (error, trace): trace' = momentum trace + h error, error' = ..."""
    one = np.eye(len(curvature))
    trace = np.hstack([curvature, momentum * one])
    direction = momentum * trace + np.hstack([curvature, 0 * one]) if nesterov else trace
    return np.vstack([np.hstack([one, 0 * one]) - direction, trace])


def radius(matrix: Matrix) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def cycle(steps: list[Matrix]) -> Matrix:
    return reduce(lambda before, after: after @ before, steps)


@pytest.mark.parametrize("nesterov", [False, True])
def test_every_batch_and_the_mean_allow_a_rate_at_which_their_cycle_resonates(
    nesterov: bool,
) -> None:
    found = curvatures()
    alone = [radius(step(h, MOMENTUM, nesterov=nesterov)) for h in found]
    assert max(alone) < 1
    assert radius(step(np.mean(found, axis=0), MOMENTUM, nesterov=nesterov)) < 1
    assert radius(cycle([step(h, MOMENTUM, nesterov=nesterov) for h in found])) > 2


def test_without_momentum_the_cycle_is_stable() -> None:
    # steps in one direction are numbers: (1 - a) (1 - a/100)^3
    a = RATE * 0.01 * 400 / 103
    assert radius(cycle([step(h, 0.0) for h in curvatures()])) == pytest.approx(
        abs((1 - a) * (1 - a / 100) ** 3), rel=1e-4
    )


def test_only_the_order_of_batches_is_between_it_and_white_inputs() -> None:
    x, plain = (
        find_workload(f"diagnosis-{name}").data().x_train.astype(np.float64)
        for name in ("resonance", "plain")
    )
    moments = x.T @ x / len(x)
    np.testing.assert_allclose(moments, 16 * np.eye(16), atol=1e-4)
    assert np.trace(plain.T @ plain / len(plain)) == pytest.approx(np.trace(moments), rel=0.1)


def test_one_solution_fits_all_batches() -> None:
    x, y, x_held_out, y_held_out = WORKLOAD.data()
    solution = np.linalg.lstsq(x.astype(np.float64), y, rcond=None)[0]
    np.testing.assert_allclose(x @ solution, y, atol=1e-5)
    np.testing.assert_allclose(x_held_out @ solution, y_held_out, atol=1e-5)
    assert y.var() == pytest.approx(1.0, rel=1e-3)


def test_the_order_is_fixed_for_this_workload_alone() -> None:
    rows = [np.concatenate(list(islice(batches(WORKLOAD, seed), 8))) for seed in (0, 1)]
    np.testing.assert_array_equal(rows, [[*range(64)] * 2] * 2)
    other = find_workload("diagnosis-noise")
    drawn = np.concatenate(list(islice(batches(other, 0), 8)))
    assert sorted(drawn) == [*range(64)] != drawn.tolist()


@pytest.mark.parametrize(("contestant", "status"), [("sgd", "reached"), ("momentum", "diverged")])
def test_a_trial_does_what_the_eigenvalues_say(contestant: str, status: str) -> None:
    config = configuration(
        WORKLOAD, contestant, 0, target=1e-6, role="evaluation", learning_rate=RATE
    )
    outcome = execute(config)["outcome"]
    assert outcome["status"] == status
    assert outcome["steps"] <= 20
