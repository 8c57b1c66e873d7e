"""The figure checks of Karakida & Osawa, in pieces and, the slow ones, as a whole."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from ntk_analysis.methods import Method
from ntk_analysis.prediction import predict
from ntk_analysis.reproduce import MissingDataError, find_checks
from ntk_analysis.reproduce.karakida_osawa import (
    cross_entropy,
    figure1,
    figure1b,
    figure2,
    figure3,
)
from ntk_analysis.results import plain
from ntk_analysis.training import Trainer

WITH_MNIST = (
    "KO-Fig1a",
    "KO-Fig1a-width",
    "KO-Fig1a-README",
    "KO-Fig1b-left",
    "KO-Fig1b-right",
)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 12)) / np.sqrt(12)
Y = RNG.standard_normal((8, 1))


def silent(what: str) -> None:
    pass


def run(identifier: str):
    outcome = find_checks([identifier])[0].run(silent)
    json.dumps(plain(outcome.data), allow_nan=False)
    assert [m for m in outcome.measurements if not m.passed] == []
    return outcome


def network(width: int, depth: int, outputs: int = 1) -> ng.MLP:
    return ng.MLP((12, *[width] * (depth - 1), outputs), rngs=nnx.Rngs(0))


def test_cross_entropy_notices_another_output_damping():
    with jax.enable_x64(True):
        problem = cross_entropy.make_problem(0)
        loss = ng.SoftmaxCrossEntropy(output_damping=0.11)
        found = cross_entropy.function_step(problem, ng.Exact(), loss, 0.0)
    wanted = np.linalg.solve(cross_entropy.output_fisher(problem.logits, 0.1), problem.residual)
    assert cross_entropy.relative_error(found, wanted) > 1e-3


@pytest.mark.parametrize(("depth", "outputs"), [(4, 1), (5, 2)])
@pytest.mark.filterwarnings("ignore::natgrad_flax.SingularCouplingWarning")
def test_the_two_solvers_agree_at_a_harmless_damping(x64, depth, outputs):
    model = network(24, depth, outputs)
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
    x, y = jnp.asarray(X), jnp.asarray(RNG.standard_normal((8, outputs)))
    one, other = (
        solver(model, x, y, 0.1) for solver in (figure1b.structured_update, figure1b.dense_update)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9 * np.abs(b).max())


def test_training_is_that_of_the_trainer():
    model = network(32, 4)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    found = figure1b.train(model, figure1b.structured_update, X, Y, 0.01, 3)
    x, y = X.astype(np.float32), Y.astype(np.float32)
    outputs = Trainer(model, ng.BlockTriDiagonal(), x, y, x[:1], 0.01).run(0.25, 3).outputs_train
    np.testing.assert_allclose(found, ((outputs - Y) ** 2).sum((1, 2)) / 16, rtol=1e-4)
    for leaf, old in zip(jax.tree.leaves(nnx.state(model)), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_a_compiled_trainer_serves_other_weights_and_samples():
    x, y = X.astype(np.float32), Y.astype(np.float32)
    models = [ng.MLP((X.shape[1], 16, 1), rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    first, fresh = (Trainer(model, ng.Exact(), x, y, x[:1]) for model in models)
    before = first.run(0.5, 2).outputs_train
    second = first.beginning_with(models[1], x[::-1], y[::-1], x[1:2]).run(0.5, 2)
    found = fresh.run(0.5, 2).outputs_train
    np.testing.assert_allclose(second.outputs_train[:, ::-1], found, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second.outputs_test[0], models[1](x[1:2]), rtol=1e-5)
    np.testing.assert_array_equal(first.run(0.5, 2).outputs_train, before)


def test_five_layers_break_down_by_rounding_only():
    model = network(64, 5)
    losses = {
        precision: figure1b.train(model, figure1b.dense_update, X, Y, 1e-12, 6, precision)
        for precision in ("float32", "float64")
    }
    assert losses["float32"].max() > losses["float32"][0]
    assert losses["float64"][-1] < 0.05 * losses["float64"][0]


def test_losses_are_infinite_after_an_update_that_is_not_finite():
    def broken(model, x, y, damping):
        return jax.tree.map(lambda p: p * jnp.nan, nnx.state(model, nnx.Param))

    losses = figure1b.train(network(8, 4), broken, X, Y, 0.1, 3)
    assert np.isfinite(losses[0])
    assert np.isinf(losses[1:]).all()


def test_network_and_theory_side_by_side():
    data = natgrad_datasets.load("gaussian", num_train=10, num_test=5, input_dim=12)
    methods = ((Method("block-diagonal", 0.5, 0.0), 4), (Method("gd", 1.0, 0.0), 6))
    natural, descent = figure1.train_beside_theory([(data, 0)], methods, 512, silent)
    assert natural.learning_rate == pytest.approx(0.5 / 3)
    np.testing.assert_allclose(natural.theory / natural.theory[0], 0.25 ** np.arange(5), rtol=1e-6)
    assert figure1.largest_deviation(natural, 0.0) > figure1.largest_deviation(natural, 1e-2) > 0
    assert figure1.largest_deviation(descent, 0.0) < 0.3
    assert (np.diff(descent.theory) < 0).all()
    assert len(descent.network) == len(descent.network_test) == len(descent.theory_test) == 7
    assert natural.ratios[0] == 1
    assert json.loads(json.dumps(natural.as_json()))["factor"] == 0.5


def test_missing_mnist_is_said_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        natgrad_datasets, "load", lambda *args, **kwargs: pytest.fail("something was loaded")
    )
    for identifier in WITH_MNIST:
        with pytest.raises(MissingDataError, match=r"MNIST.*NATGRAD_DATA"):
            find_checks([identifier])[0].run(silent)


def test_condition_numbers_against_explicit_matrices():
    x = figure3.gaussian_inputs(8, 12, 3)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
    found = figure3.condition_numbers(x, 48, 0.5, 3)
    _, signals = figure3.network_signals(x, 48, 0.5, 3)
    with jax.enable_x64(True):
        jacobian = np.asarray(signals.train.to_dense())
    diagonal = (jacobian**2).mean(axis=0)
    scaled = jacobian[:, diagonal > 0] / np.sqrt(diagonal[diagonal > 0])
    assert found["NTK"] == pytest.approx(np.linalg.cond(jacobian @ jacobian.T), rel=1e-6)
    assert found["diagonal"] == pytest.approx(np.linalg.cond(scaled @ scaled.T), rel=1e-6)
    assert found["block-diagonal"] == pytest.approx(1, abs=1e-6)
    assert 1 < found["unit-wise"] < found["quasi-diagonal"] < found["NTK"]


def test_what_claims_depend_on_is_told():
    left, right = find_checks(["KO-Fig1b-left", "KO-Fig1b-right"])
    assert "monotone" in left.remark
    assert "rounding" in right.remark


@pytest.mark.slow
@pytest.mark.skipif(
    "NATGRAD_DATA" not in os.environ, reason="needs MNIST: set NATGRAD_DATA to a folder that has it"
)
@pytest.mark.parametrize("identifier", WITH_MNIST)
def test_figure_1(identifier):
    run(identifier)


@pytest.mark.slow
def test_figure_3():
    run("KO-Fig3")


def test_layer_wise_predictions_written_out_are_those_of_the_library():
    data = natgrad_datasets.load("gaussian", num_train=10, num_test=5, input_dim=12)
    structures = {"exact": ng.Exact(), "tri": ng.BlockTriDiagonal(), "kfac": ng.KFAC()}
    found = figure2.accuracies(data, structures, silent, width=16, initialisations=20)
    model = ng.MLP((12, 16, 16, data.output_dim), rngs=nnx.Rngs(0))
    for accuracy, structure in zip(found, structures.values(), strict=True):
        prediction = predict(
            structure, model, data.x_train, data.y_train, data.x_test, initialisations=20
        )
        expected = prediction.sampled_accuracies(data.y_test)
        np.testing.assert_array_equal(accuracy.values, expected)
        assert accuracy.name in structures
    assert found[0].values != found[1].values
