"""Figures 4 and 5 of Kerekes et al. (2021): their checks at tiny size, the drawings."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from natgrad_datasets import sparse_classification

from natgrad_flax.linear import logistic, references
from natgrad_flax.linear import matrix_factorization as mf
from ntk_analysis.frame import theme
from ntk_analysis.reproduce import load_checks
from ntk_analysis.reproduce.drawings import DRAWINGS
from ntk_analysis.reproduce.kerekes import (
    common,
    completion,
    natural_completion,
    sparse,
    sparse_runs,
)
from ntk_analysis.results import plain

load_checks()
SPARSE = sparse_runs.Setting(
    dim=40,
    num_relevant=3,
    counts=(20, 40, 100),
    seeds=(0,),
    euclidean_step=0.05,
    euclidean_steps=2000,
    natural_steps=60,
    population_steps=400,
    tolerance=0.2,
)

MATRICES = completion.Setting(
    size=14,
    rank=1,
    counts=(100, 150),
    shown=100,
    learning_rate=1e-2,
    max_steps=20_000,
    natural_time=2.0,
    seed=0,
    others=(1,),
)


def silent(what: str) -> None:
    pass


def as_read(data):
    """Data as results.json gives them back."""
    return plain(json.loads(json.dumps(data, default=np.ndarray.tolist)))


def draw(identifier, data):
    """The size of the PNG that a drawing makes."""
    with theme():
        figure = DRAWINGS[identifier](as_read(data))
        file = io.BytesIO()
        figure.savefig(file, dpi=60)
    return figure, len(file.getvalue())


@pytest.fixture(scope="module")
def classified():
    said = []
    with jax.enable_x64(True):
        return sparse.measure(SPARSE, said.append), said


def test_sparse_teachers_at_tiny_size(classified):
    outcome, said = classified
    found = {m.what: m for m in outcome.measurements}
    assert all(np.isfinite(m.measured) for m in outcome.measurements)
    for what in (
        "N >= 0.75 D: max(L = 2, L = 3) - (L = 1), smallest",
        "sparsity: (L = 1) over (L = 2)",
        "sparsity: train Fisher over (L = 1)",
        "slope of y s over t, second half: mean",
        "margins of both solutions, N < D, from u <- u + eta (1 + e^-u): relative",
        "full-rank solver, N < D: accuracy from 0.5, over its noise: largest",
        "y s of the flow from a random start, from its closed form: largest",
    ):
        assert found[what].passed, found[what]
    assert any("N = 100, seed 0: accuracy of" in line for line in said)
    accuracy = outcome.data["accuracy"]
    assert accuracy[sparse_runs.LIMIT][1] == 0.5
    assert np.argmax(accuracy[sparse_runs.EUCLIDEAN[2]]) == 2


def test_drawing_of_sparse_classification(classified):
    figure, size = draw("KE-Fig4", classified[0].data)
    assert size > 10_000
    # three panels, the third one of three strips
    assert len(figure.axes) == 5
    assert [len(axis.lines) for axis in figure.axes[:1]] == [9]


def test_theory_of_the_train_fisher(x64):
    data = sparse_classification(60, 1, 30, 3, 0)
    for num in (15, 60):
        x, y = data.x_train[:num], data.y_train[:num]
        beta = sparse_runs.natural(x, y, replace(SPARSE, dim=30, natural_steps=300), silent)
        found = references.gaussian_accuracy(beta, data.teacher)
        expected = sparse_runs.limit_accuracy(x, y, data.teacher)
        # below D theory holds for large D, above it for these samples
        assert abs(found - expected) < (0.1 if num == 15 else 0.02)


def test_unit_speed_keeps_the_direction(x64):
    data = sparse_classification(12, 1, 6, 2, 0)
    field = logistic.natural_gradient_field(
        data.x_train, data.y_train, data="population", normalised=True
    )
    beta = jnp.arange(6.0) / 5
    found, plain_field = sparse_runs.unit_speed(field, beta), field(beta)
    np.testing.assert_allclose(jnp.linalg.norm(found), 1, rtol=1e-12)
    np.testing.assert_allclose(found * jnp.linalg.norm(plain_field), plain_field, rtol=1e-12)


def test_logits_notice_another_metric(x64):
    data = sparse_classification(10, 1, 20, 2, 0)
    found = sparse_runs.logits(data.x_train, data.y_train, 0)
    assert all(m.passed for m in sparse.judge_logits(found))
    slower = found._replace(from_zero=0.9 * found.from_zero)
    assert not all(m.passed for m in sparse.judge_logits(slower))
    other = found._replace(elsewhere=found.elsewhere + 1e-3)
    assert not all(m.passed for m in sparse.judge_logits(other))


def test_sparsity():
    assert sparse.sparsity(np.array([2.0, -2, 1, 0]), 2) == 0.25


def test_pieces_are_one_descent(x64):
    field = jax.tree_util.Partial(_decay)
    said = []
    settings = {"step_size": 0.1, "steps": 6, "report": said.append, "what": "decay"}
    states = common.in_pieces(field, jnp.ones(2), pieces=3, **settings)
    assert len(states) == 4
    np.testing.assert_allclose(states[1:], 0.9 ** np.tile([[2], [4], [6]], 2), rtol=1e-12)
    assert said[-1] == "decay: step 6 of 6"
    with pytest.raises(ValueError, match="pieces=4 must divide steps=6"):
        common.in_pieces(field, jnp.ones(2), pieces=4, **settings)


def _decay(parameters):
    return parameters


@pytest.fixture(scope="module")
def completed():
    with jax.enable_x64(True):
        return completion.run_all(MATRICES, silent)


def test_completion_at_tiny_size(completed):
    one, two, three = (completed.found[completion.EUCLIDEAN[d]][0] for d in (1, 2, 3))
    assert abs(one.error - (1 - 100 / 14**2)) < 0.15
    assert three.error < 0.05 < one.error
    assert three.rank < two.rank < one.rank
    assert max(abs(change) for change in completed.drift) < 0.1
    # the same observations and factors: the run of the left panel
    assert completed.collapsed[2][0] is completed.found[completion.EUCLIDEAN[2]][0]
    assert completed.collapsed[2][1].error != completed.collapsed[2][0].error
    found = completion.judge(MATRICES, completed)
    assert all(np.isfinite(m.measured) for m in found)
    assert [m.passed for m in found if "observed error of EGD" in m.what] == [True]


def test_drawing_of_completion(completed):
    figure, size = draw("KE-Fig5", completion.describe(MATRICES, completed))
    assert size > 8_000
    left, middle, right = figure.axes
    assert len(left.lines) == 6
    assert len(right.lines) == 2
    assert middle.get_yscale() == "log"


def test_summary_of_a_completion():
    case = completion.Problem(np.eye(2), np.array([[True, False], [False, False]]))
    found = completion.summary(case, np.diag([2.0, 2.0]))
    assert found == pytest.approx((0.5, 2, 4, 1))
    assert case.unobserved_error(np.diag([2.0, 2.0])) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def naturals():
    with jax.enable_x64(True):
        return natural_completion.run_natural(MATRICES, silent)


def test_natural_gradient_at_tiny_size(naturals):
    found = {m.what: m for m in natural_completion.judge_natural(MATRICES, naturals)}
    assert all(np.isfinite(m.measured) for m in found.values())
    assert found["L = 1: unobserved entries move"].passed
    assert found["L = 2: the same over that of half the step size"].measured > 1
    assert found["L = 1: observed error over (1 - eta)^2t of the first"].passed


def test_natural_runs_notice_a_euclidean_step(x64):
    case = completion.problem(MATRICES, MATRICES.shown)
    start = completion.draw_factors(MATRICES, 2, 1.0)
    field = mf.gradient_field(case.target, case.mask)
    moved = mf.product([w - 0.02 * d for w, d in zip(start, field(start), strict=True)])
    path = completion.Path(np.arange(2), np.array([mf.product(start), moved]))
    assert natural_completion.displacement(case, path)[-1] > 0.01


def test_drawing_of_the_natural_runs(naturals):
    figure, size = draw("KE-Fig5-NGD", natural_completion.describe_natural(MATRICES, naturals))
    assert size > 8_000
    left, right = figure.axes
    assert [len(axis.lines) for axis in (left, right)] == [6, 5]
    assert "does not move" in right.texts[0].get_text()


def test_a_run_that_leaves_every_bound():
    steps, betas = np.arange(4.0), np.ones((4, 2, 2))
    cut = completion.Path(steps, betas)
    assert natural_completion.blow_up(MATRICES, cut) == pytest.approx(0.8)
    whole = completion.Path(np.arange(11.0), np.ones((11, 2, 2)))
    assert natural_completion.blow_up(MATRICES, whole) is None
