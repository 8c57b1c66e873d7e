"""How people run optimizers: schedules, norm constraints, weight decay, averaged parameters."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_leaderboard as toy
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard import recipes
from benchmarks.leaderboard.contestant import contestants, find_contestant
from benchmarks.leaderboard.plan import PROFILES, make_plan
from benchmarks.leaderboard.program import OptaxProgram
from benchmarks.leaderboard.recipes import LONGEST, norm_constraint
from benchmarks.leaderboard.schedules import cosine, nominal, warm_up_steps
from benchmarks.leaderboard.workload import Data

RUN_SO = (
    "nadamw-cosine", "ademamix-cosine", "soap-cosine", "shampoo-cosine", "foof-cosine",
    "kfac-cosine", "ekfac-cosine", "unit-blocks-cosine", "exact-spring", "block-diagonal-spring",
    "schedule-free", "schedule-free-fixed", "prodigy",
)  # fmt: skip
UNTUNED = tuple(
    f"{cls.style.command}-quadratic"
    for cls in (ng.Exact, ng.BlockDiagonal, ng.BlockTriDiagonal, ng.KFAC, ng.EKFAC, ng.UnitWise,
                ng.Diagonal, ng.QuasiDiagonal)
)  # fmt: skip


def test_the_learning_rate_rises_and_falls_as_a_cosine() -> None:
    workload = toy.make_workload(max_steps=200)
    assert warm_up_steps(workload) == 10
    schedule = cosine(workload, 0.3)
    found = [float(schedule(step)) for step in (0, 5, 10, 105, 200, 300)]
    # linear from 1/11 of the peak; then half of it in the middle of the other 190 steps
    middle = 0.3 * (1 / 11 + 10 / 11 / 2)
    assert found == pytest.approx([0.3 / 11, middle, 0.3, 0.15, 0, 0], rel=1e-5, abs=1e-7)
    assert float(cosine(toy.make_workload(max_steps=1), 0.3)(0)) == pytest.approx(0.15)


def test_a_rate_for_standard_parametrisation_is_ten_times_as_large_in_that_of_the_ntk() -> None:
    assert nominal(toy.make_workload(), 0.01) == pytest.approx(0.1)
    stock = toy.make_workload(settings={"parametrisation": "standard"})
    assert nominal(stock, 0.01) == 0.01


def test_a_norm_constraint_bounds_the_step_in_the_metric_of_its_direction() -> None:
    rng = np.random.default_rng(0)
    root, gradient = rng.normal(size=(4, 4)), rng.normal(size=4)
    metric = root @ root.T + np.eye(4)
    direction = np.linalg.solve(metric, gradient)
    length = direction @ metric @ direction
    tail = norm_constraint(1e-2, lambda count: jnp.where(count == 0, 0.5, 1e-3))
    state = tail.init(None)
    updates = {"w": jnp.asarray(-direction, jnp.float32)}
    grads = {"w": jnp.asarray(gradient, jnp.float32)}
    bounded, state = tail.update(updates, state, grad=grads)
    step = 0.5 * np.asarray(bounded["w"])
    assert step @ metric @ step == pytest.approx(1e-2, rel=1e-4)
    np.testing.assert_allclose(step / np.linalg.norm(step), -direction / np.linalg.norm(direction),
                               rtol=1e-4)  # fmt: skip
    # at the smaller rate of the second step it is short enough
    assert 1e-6 * length < 1e-2
    free, _ = tail.update(updates, state, grad=grads)
    np.testing.assert_array_equal(free["w"], updates["w"])


def test_who_takes_part_where() -> None:
    assert set(RUN_SO) <= set(contestants())
    networks, default = make_plan("networks").contestants, make_plan("default").contestants
    assert set(RUN_SO) - {"schedule-free-fixed"} <= set(networks)
    assert set(RUN_SO) & set(default) == {"schedule-free", "prodigy"}
    assert set(RUN_SO) <= set(make_plan("full").contestants)
    assert {"-cosine", "-spring", "-fixed"} <= set(PROFILES["full"].variants)
    training = make_plan("training")
    assert set(training.workloads) == set(PROFILES["training"].workloads)
    assert {*RUN_SO, *UNTUNED} <= set(training.contestants)
    assert not set(UNTUNED) & set(default)


def two_layers() -> toy.Workload:
    """Three classes, a hidden layer, batches of 4 of 6 samples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    y = np.eye(3, dtype=np.float32)[np.arange(6) % 3]
    return toy.make_workload(
        data=lambda: Data(x, y, x, y),
        model=lambda seed: ng.MLP((4, 5, 3), rngs=nnx.Rngs(seed)),
        loss=ng.SoftmaxCrossEntropy(),
        batch_size=4,
        metric="train",
    )


def test_a_step_of_averaged_factors_is_a_natural_one_that_is_not_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # so much that the test sees it
    decay = 0.5
    monkeypatch.setattr(recipes, "WEIGHT_DECAY", decay)
    workload, entry, rate = two_layers(), find_contestant("kfac-cosine"), 1.0
    x, y = (jnp.asarray(array[:4]) for array in workload.data()[:2])
    model = workload.model(3)
    direction = ng.natural_gradient(
        model, x, y, structure=entry.structure, loss=workload.loss, damping=entry.damping,
        fisher="mc", key=jax.random.split(jax.random.key(3))[1],
    )  # fmt: skip
    graphdef, start = nnx.split(model)
    gradient = jax.grad(lambda state: workload.loss(nnx.merge(graphdef, state)(x), y))(start)
    eta = float(cosine(workload, rate)(0))
    squared = eta**2 * float(optax.tree.vdot(direction, gradient))
    assert squared > LONGEST
    shorter = math.sqrt(LONGEST / squared)
    program = OptaxProgram(entry, workload)
    moved = program.parameters(program.step(program.start(3, rate), np.arange(4)))
    wanted = jax.tree.map(
        lambda leaf, slope: leaf - eta * (shorter * slope + decay * leaf), start, direction
    )
    for here, there in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-6)


def test_schedule_free_is_judged_at_its_average() -> None:
    workload = toy.make_workload(max_steps=20)
    program = OptaxProgram(find_contestant("schedule-free"), workload)
    state = program.start(0, 0.1)
    for _ in range(3):
        state = program.step(state, None)
    judged, moved = (toy.as_array(tree) for tree in (program.parameters(state), state[0]))
    # y = (1 - b1) z + b1 x, and x is what is judged
    ahead = toy.as_array(state[1].z)
    np.testing.assert_allclose(0.1 * ahead + 0.9 * judged, moved, rtol=1e-5)
    assert np.abs(judged - moved).max() > 1e-3


def test_a_structure_without_settings_takes_the_best_step_along_its_direction() -> None:
    """On a line the quadratic model is the loss itself, with the damping of the first step."""
    workload, entry = toy.make_workload(), find_contestant("diagonal-quadratic")
    assert (entry.ruleset, entry.rate_rule) == ("self-tuning", "quadratic model")
    x, y = (jnp.asarray(array) for array in workload.data()[:2])
    program = OptaxProgram(entry, workload)
    start = toy.as_array(nnx.state(workload.model(3)))
    state = program.step(program.start(3, 1.0), None)
    moved = toy.as_array(program.parameters(state))
    design = np.asarray(x) / np.sqrt(3)
    slope = design.T @ (design @ start - np.asarray(y)[:, 0]) / len(design)
    rho = ng.LevenbergMarquardt().initial
    damped = design.T @ design / len(design) + rho * np.eye(3)
    direction = -slope / np.diag(damped)
    length = -(direction @ slope) / (direction @ damped @ direction)
    assert abs(length - 1) > 0.01
    np.testing.assert_allclose(moved - start, length * direction, rtol=1e-3)


@pytest.mark.parametrize("name", RUN_SO)
def test_facts_of_what_people_run(name: str) -> None:
    facts = find_contestant(name).facts()
    fixed = name in ("schedule-free-fixed", "prodigy")
    assert facts["rate_rule"] == ("fixed" if fixed else "tuned, 3 studies of 5 trials")
    scheduled = name.endswith(("-cosine", "-spring")) or name == "prodigy"
    assert ("cosine" in facts["title"]) == scheduled
    if name.endswith("-spring"):
        assert facts["damping"].startswith("0.01, added to the Fisher")
        assert "on a full batch of squared error 1e-06 of the mean Gram" in facts["damping"]
