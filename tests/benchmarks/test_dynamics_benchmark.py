"""The suite of training curves: its training is the project's, its gaps are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ntk_analysis as na
from benchmarks import dynamics
from benchmarks.dynamics import Dynamics, Prediction
from ntk_analysis.training import Trainer


def test_training_is_that_of_the_trainer_and_leaves_the_model_alone():
    data, method = dynamics.digits(), dynamics.find_method("block-diagonal")
    with jax.enable_x64(True):
        graphdef, state = nnx.split(dynamics.make_model(data, 16))
        model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
        before = jax.tree.map(np.array, nnx.state(model))
        x, y, x_test = (jnp.asarray(a) for a in (data.x_train, data.y_train, data.x_test))
        found = dynamics.train(method, 0.2, model, x, y, jnp.concatenate([x, x_test]), 2)
        trainer = Trainer(model, method.structure, x, y, x_test, method.damping)
        expected = trainer.run(0.2, 2)
        after = nnx.state(model)
    outputs = np.concatenate([expected.outputs_train, expected.outputs_test], axis=1)
    np.testing.assert_allclose(found.outputs, outputs, rtol=1e-8, atol=1e-10)
    assert found.first_move.shape == outputs.shape[1:]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))


def test_first_step_must_be_the_predicted_one():
    move = np.array([[1.0], [2.0]])
    dynamics.check_first_step("x", move, move * (1 + 1e-9), 1e-6)
    for wrong in (2 * move, -move, move[::-1], np.full((2, 1), np.nan)):
        with pytest.raises(ArithmeticError, match="x: the first step is not the one"):
            dynamics.check_first_step("x", move, wrong, 1e-2)


def test_gaps_are_shares_of_the_start():
    steps = max(dynamics.STEPS)
    targets = np.zeros((2, 1))
    trained = np.stack([np.array([[3.0], [4.0]])] + [np.array([[0.0], [1.0]])] * steps)
    predicted = np.stack([trained[0]] + [np.zeros((2, 1))] * steps)
    theory = na.LinearisedDynamics(predicted, None, targets)
    found = dynamics.gaps(trained, theory)
    for step in dynamics.STEPS:
        assert found[f"loss gap {step}"] == pytest.approx(1 / 25)
        assert found[f"output gap {step}"] == pytest.approx(1 / 5)
    same = dynamics.gaps(predicted, theory)
    assert set(same.values()) == {dynamics.SMALLEST_GAP}


def test_one_training_serves_all_steps_and_gaps_fall_with_the_width(tmp_path, monkeypatch):
    measured = []
    measure = Dynamics.measure
    monkeypatch.setattr(
        Dynamics, "measure", lambda self, *c: measured.append(c) or measure(self, *c)
    )
    found = {}
    for width in (32, 512):
        for steps in dynamics.STEPS:
            suite, case = Dynamics(), ("exact", width, steps)
            suite.setup(str(tmp_path), *case)
            found[width, steps] = suite.track_output_gap(str(tmp_path), *case)
            assert suite.track_loss_gap(str(tmp_path), *case) > 0
    assert measured == [("exact", 32), ("exact", 512)]
    assert found[512, 1] < 0.7 * found[32, 1]
    assert found[512, 3] < found[512, 1]


def test_training_that_is_not_finite_fails():
    data, method = dynamics.digits(), dynamics.find_method("gd")
    x, y = jnp.asarray(data.x_train, jnp.float32), jnp.asarray(data.y_train, jnp.float32)
    with pytest.raises(ArithmeticError, match="gd: training gives outputs that are not finite"):
        dynamics.train(method, 1e30, dynamics.make_model(data, 8), x, y, x, 2)


def test_prediction_is_timed_and_checked(tmp_path, monkeypatch):
    suite = Prediction()
    suite.setup(str(tmp_path), "gd", 16)
    assert suite.track_seconds() > 0
    rate = dynamics.learning_rate
    monkeypatch.setattr(
        dynamics,
        "learning_rate",
        lambda *a: dynamics.LearningRate(3 * rate(*a).value, "1/lambda_max", ""),
    )
    with pytest.raises(ArithmeticError, match="predicted loss rises"):
        Prediction().measure("gd", 16)


def test_what_the_suites_show_is_named_and_has_units():
    for suite in (Dynamics, Prediction):
        assert len(suite.params) == len(suite.param_names)
        tracks = [getattr(suite, name) for name in dir(suite) if name.startswith("track_")]
        assert tracks
        assert all(track.unit and track.__doc__ for track in tracks)
