"""Workloads that curvature can win or lose: equations, text, a recurrent net; and validation."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_leaderboard as toy
from flax import nnx

from benchmarks.equations import BOUNDARY, INSIDE, Residuals, derivatives
from benchmarks.leaderboard import trial
from benchmarks.leaderboard.contestant import find_contestant
from benchmarks.leaderboard.plan import PROFILES
from benchmarks.leaderboard.program import Evaluation
from benchmarks.leaderboard.studies import STUDIES, tuning_seed
from benchmarks.leaderboard.trial import configuration, execute
from benchmarks.leaderboard.workload import METRICS, Data, find_workload
from benchmarks.leaderboard.workloads import digits_rows, equations, language_bytes

EQUATIONS = ("poisson-2d", "heat", "poisson-5d")
# 1-2-1 networks on a few rows, for a step in float64
TINY = {"widths": [2, 3, 1], "num_train": 12, "num_inside": 8, "num_held_out": 6,
        "num_validation": 2}  # fmt: skip


class Solution(nnx.Module):
    """The solution of an equation in place of a network."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.name == "heat":
            found = jnp.exp(-(jnp.pi**2) * x[:, 1] / 4) * jnp.sin(jnp.pi * x[:, 0])
        elif self.name == "poisson-2d":
            found = jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1])
        else:
            found = jnp.cos(jnp.pi * x).sum(1)
        return found[:, None]


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_solution_of_an_equation_leaves_nothing(name: str, x64: None) -> None:
    workload = find_workload(name)
    x, y, x_held_out, y_held_out = workload.data()
    model = workload.model(0)
    assert isinstance(model, Residuals)
    model.network = Solution(name)
    rows = np.concatenate([x[:200], x_held_out[:20]])
    wanted = np.concatenate([y[:200], y_held_out[:20]])
    np.testing.assert_allclose(model(jnp.asarray(rows)), wanted, atol=1e-10)


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_are_inside_and_on_the_faces_that_have_values(name: str) -> None:
    workload = find_workload(name)
    x, settings = workload.data().x_train, workload.settings
    points, kind = x[:, :-1], x[:, -1]
    assert (kind == INSIDE).sum() == settings["num_inside"]
    assert (kind == BOUNDARY).sum() == settings["num_train"] - settings["num_inside"]
    on = (points == 0) | (points == 1)
    np.testing.assert_array_equal(on.sum(axis=1), kind == BOUNDARY)
    faces = {(int(axis), float(points[row, axis])) for row, axis in np.argwhere(on)}
    # the end of time is no boundary
    assert len(faces) == 2 * points.shape[1] - (name == "heat")
    assert ((1, 1.0) in faces) == (name == "poisson-2d" or name == "poisson-5d")


def test_derivatives_are_those_of_a_polynomial(x64: None) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    first, second = derivatives(lambda x: (x[:, :1] ** 3) * x[:, 1:] ** 2, x)
    a, b = x[:, 0], x[:, 1]
    np.testing.assert_allclose(first[..., 0], [3 * a**2 * b**2, 2 * a**3 * b])
    np.testing.assert_allclose(second[..., 0], [6 * a * b**2, 2 * a**3])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trials of a changed workload under its own name."""
    caches = (trial._program, trial._rate, trial._evaluation)

    def run(workload: Any, contestant: str, rate: float | None, **changes: Any) -> dict[str, Any]:
        monkeypatch.setattr(trial, "find_workload", lambda name: workload)
        for cached in caches:
            cached.cache_clear()
        known = {"seed": 0, "target": None, "role": "evaluation", "learning_rate": rate}
        options = {**known, **changes}
        seed = options.pop("seed")
        found: dict[str, Any] = execute(configuration(workload, contestant, seed, **options))
        return found["outcome"]  # type: ignore[no-any-return]

    yield run
    for cached in caches:
        cached.cache_clear()


def test_a_trial_in_float64_is_so_from_the_model_on(small: Any) -> None:
    settings = {**find_workload("poisson-2d").settings, **TINY, "widths": [2, 16, 1]}
    made: list[Any] = []

    def model(seed: int) -> nnx.Module:
        found = equations.model(settings, seed)
        made.extend(leaf.dtype for leaf in jax.tree.leaves(nnx.state(found)))
        return found

    workload = dataclasses.replace(
        find_workload("poisson-2d"), settings=settings, max_steps=60, metric="train",
        data=lambda: equations.data("poisson-2d", settings), model=model,
    )  # fmt: skip
    outcome = small(workload, "exact-mc-lm", None)
    assert {str(dtype) for dtype in made} == {"float64"}
    assert outcome["final"] < 1e-6 * outcome["curve"]["train"][0]
    assert not jax.config.jax_enable_x64


def test_the_text_is_that_of_the_files_and_no_piece_is_in_both_parts() -> None:
    workload = find_workload("language-bytes")
    if workload.missing():
        pytest.skip(workload.missing())
    x, y, x_held_out, y_held_out = workload.data()
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    np.testing.assert_array_equal(x_held_out[:, 1:], y_held_out[:, :-1])
    assert max(map(np.max, workload.data())) < workload.settings["vocabulary"]
    source = (Path(sysconfig.get_path("stdlib")) / "difflib.py").read_bytes()
    assert bytes(x[0].tolist()) == source[:64]
    assert bytes(x[1].tolist()) == source[65:129]
    tails = [text[len(text) * 89 // 100 :] for text in language_bytes._texts()]
    assert all(any(bytes(piece) in tail for tail in tails) for piece in x_held_out.astype(np.uint8))


def test_other_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(language_bytes.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "has no" in find_workload("language-bytes").missing()
    for name in language_bytes.FILES:
        (tmp_path / name).write_bytes(b"text")
    assert "difflib.py of this Python is not the file" in find_workload("language-bytes").missing()
    digests = dict.fromkeys(language_bytes.FILES, hashlib.sha256(b"text").hexdigest())
    monkeypatch.setattr(language_bytes, "FILES", digests)
    assert find_workload("language-bytes").missing() == ""


def test_who_suits_tokens() -> None:
    workload = find_workload("language-bytes")
    if workload.missing():
        pytest.skip(workload.missing())
    assert "these are tokens" in find_contestant("kfac-mc-lm").unsuitable(workload)
    assert find_contestant("kfac-cosine").unsuitable(workload) == ""


def test_a_row_reader_is_a_gated_recurrent_unit() -> None:
    model = digits_rows.RowReader(2, 3, 4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    w, u, v = (np.asarray(layer.kernel[...]) for layer in (model.of_input, model.of_state,
                                                           model.readout))  # fmt: skip
    state = np.zeros((5, 3))

    def sigmoid(a: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-a))

    for step in range(3):
        given, kept = np.split(x[:, step] @ w, 3, 1), np.split(state @ u, 3, 1)
        reset, stay = sigmoid(given[0] + kept[0]), sigmoid(given[1] + kept[1])
        state = stay * state + (1 - stay) * np.tanh(given[2] + reset * kept[2])
    np.testing.assert_allclose(model(jnp.asarray(x)), state @ v, rtol=1e-5, atol=1e-6)


def test_metrics_of_equations_and_tokens_by_hand() -> None:
    outputs, targets = jnp.array([[3.0], [4.0]]), jnp.array([[3.0], [0.0]])
    assert METRICS["relative"].function(outputs, targets) == pytest.approx(4 / 3)  # type: ignore[misc]
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75]]]))
    found = METRICS["token"].function(logits, jnp.array([[0, 1]]))  # type: ignore[misc]
    assert found == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)


def test_validation_samples_choose_and_the_others_judge(small: Any) -> None:
    x = np.ones((8, 3), np.float32)
    held_out = np.arange(4, dtype=np.float32)[:, None]

    def data() -> Data:
        return Data(x, x[:, :1], x[:4], held_out)

    workload = toy.make_workload(settings={"num_validation": 3}, data=data, max_steps=1)
    state = nnx.state(workload.model(0))
    at = float(workload.model(0)(x[:1])[0, 0])
    chosen = Evaluation(workload, validation=True)(state)[1]
    assert chosen == pytest.approx(np.mean((at - held_out[:3]) ** 2), rel=1e-5)
    assert Evaluation(workload)(state)[1] == pytest.approx((at - 3) ** 2, rel=1e-5)
    for seed, wanted in (*((tuning_seed(study), 3) for study in range(STUDIES)), (0, 1)):
        start = small(workload, "sgd", 0.1, seed=seed, role="freezing")["curve"]["held_out"][0]
        first = float(workload.model(seed)(x[:1])[0, 0])
        rows = held_out[:3] if wanted == 3 else held_out[3:]
        assert start == pytest.approx(np.mean((first - rows) ** 2), rel=1e-4)


def test_who_tunes_itself_has_one_and_a_half_times_the_budget(small: Any) -> None:
    workload = toy.make_workload(max_steps=5, max_seconds=7.0)
    tuned, own = find_contestant("sgd"), find_contestant("lbfgs")
    assert (tuned.ruleset, own.ruleset) == ("tuned", "self-tuning")
    assert tuned.budgeted(workload) is workload
    longer = own.budgeted(workload)
    assert (longer.max_steps, longer.max_seconds) == (8, 10.5)
    assert small(workload, "sgd", 0.01)["steps"] == 5
    assert small(workload, "schedule-free-fixed", None)["steps"] == 8
    # a target is frozen by the budget of the workload, and by steps alone
    hasty = dataclasses.replace(workload, max_seconds=0.0)
    assert small(hasty, "schedule-free-fixed", None)["steps"] == 0
    assert small(hasty, "schedule-free-fixed", None, role="freezing")["steps"] == 5


def test_every_workload_of_the_board_says_what_is_expected() -> None:
    for name in PROFILES["training"].workloads:
        workload = find_workload(name)
        assert workload.expectation.startswith("Curvature should")
        assert workload.curvature_wins is not None
