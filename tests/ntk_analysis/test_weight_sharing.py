"""Isotropy of networks with shared weights: constants, conditions, infinite width, commands."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.optimizer.learning_rate import model_geometry
from natgrad_flax.structures.weight_sharing import (
    SharedGeometry,
    signals_geometry,
    traced_geometry,
)
from ntk_analysis import methods
from ntk_analysis.analytic import analytic_layer_kernels
from ntk_analysis.cli import app
from ntk_analysis.conditions import failed_conditions, measured_ranks
from ntk_analysis.empirical import initial_signals
from ntk_analysis.experiment import run_dynamics
from ntk_analysis.isotropy import isotropy, isotropy_of
from ntk_analysis.isotropy_run import IsotropySettings, run_isotropy
from ntk_analysis.networks import build_network
from ntk_analysis.reproduce.natgrad.common import conv_net, images, layer_coefficients
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.sweep import SweepSettings
from ntk_analysis.tables import setting_sentence

SHAPE, N, C = (2, 2, 6), 3, 2
WIDE = (26, 26)


@pytest.fixture(scope="module")
def wide():
    """A network that meets all conditions: N T = 12 of 54 inputs, N C T = 24 of 26 channels."""
    model = conv_net(SHAPE, WIDE, C, activation="tanh", bias_variance=0.1)
    return model, images(N, SHAPE), initial_signals(model, images(N, SHAPE))


def dense_layers(model, x):
    """J_l (N C, P_l) from automatic differentiation of the whole network."""
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf.astype(np.float64), state)
    jacobian = jax.jacrev(lambda s: nnx.merge(graphdef, s)(x).reshape(-1))(state)
    parts = [*jacobian["convolutions"].values(), jacobian["readout"]]
    rows = len(x) * model.outputs
    return [
        np.concatenate([np.reshape(leaf, (rows, -1)) for leaf in jax.tree.leaves(part)], axis=1)
        for part in parts
    ]


def test_empirical_kernels_are_those_of_the_dense_jacobian(wide):
    model, x, _ = wide
    with jax.enable_x64(True):
        layers = dense_layers(model, x)
        for ours, jacobian in zip(na.empirical_layer_kernels(model, x), layers, strict=True):
            np.testing.assert_allclose(ours, jacobian @ jacobian.T, rtol=1e-9, atol=1e-12)


def test_sizes_of_a_conv_net(wide):
    model, _, signals = wide
    geometry = signals_geometry(model, signals.train)
    expected = SharedGeometry(((55, 26), (235, 26), (105, 2)), N, C, 1.0, (4, 4, 1))
    assert geometry == expected == traced_geometry(model, SHAPE, np.float32, N)
    mlp = ng.MLP((4, 3, 1), rngs=nnx.Rngs(0))
    found = signals_geometry(mlp, initial_signals(mlp, np.ones((2, 4))).train)
    assert found == traced_geometry(mlp, (4,), np.float32, 2) == model_geometry(mlp, 2)
    assert not isinstance(found, SharedGeometry)


@pytest.mark.parametrize(
    ("structure", "alpha"),
    [
        (ng.Exact(), 1.0),
        (ng.BlockDiagonal(), 3.0),
        (ng.KFAC(), N * (2 * 4**2 + 1)),
        (ng.KFAC(last_layer="literal"), N * 2 * 4**2 + 1),
        (ng.UnitWise(), 1 + sum(WIDE)),
    ],
)
def test_constants_where_all_conditions_hold(wide, structure, alpha):
    model, _, signals = wide
    geometry = signals_geometry(model, signals.train)
    found = isotropy_of(structure, signals, geometry)
    assert found.failed_conditions == ()
    assert found.theoretical_alpha == pytest.approx(alpha)
    assert found.alpha == pytest.approx(alpha)
    assert found.is_isotropic()
    assert found.learning_rate == pytest.approx(1 / alpha)


def test_constants_that_do_not_exist(wide):
    model, _, signals = wide
    geometry = signals_geometry(model, signals.train)
    for structure in (ng.KFAC(sharing="reduce"), ng.Diagonal(), na.GradientDescent()):
        with pytest.raises(ValueError, match=r"alpha|isotropic"):
            structure.shared_alpha(geometry)
    explicit = SharedGeometry(((3, 2), (2, 1)), N, 1, None, (None, 1))
    with pytest.raises(ValueError, match="layers with inputs and units"):
        ng.KFAC().shared_alpha(explicit)
    dense = SharedGeometry(((3, 2), (2, 2), (2, 1)), N, 1, None, (4, 1, 1))
    with pytest.raises(ValueError, match="fraction of active units"):
        ng.UnitWise().shared_alpha(dense)
    with_gamma = SharedGeometry(((3, 2), (2, 6), (2, 3)), N, 3, 0.5, (4, 1, 1))
    assert ng.UnitWise().shared_alpha(with_gamma) == pytest.approx(1 + 2 + 0.5 * 6 / 3)


def test_conditions_that_fail_are_named():
    x = images(8, SHAPE)
    model = conv_net(SHAPE, (4, 4), 1, pooling="average")
    train = initial_signals(model, x).train
    geometry, ranks = signals_geometry(model, train), measured_ranks(train)
    assert [layer.inputs for layer in ranks.layers] == [32, 32, 4]
    assert [layer.derivatives for layer in ranks.layers[:2]] == [4, 4]
    assert failed_conditions(ng.Exact(), geometry, ranks) == ()
    (readout,) = failed_conditions(ng.BlockDiagonal(), geometry, ranks)
    assert readout.startswith("layer 3 (the last): its inputs have rank 4 of the 8")
    assert "all positions" in readout
    first, second, last = failed_conditions(ng.KFAC(), geometry, ranks)
    assert "layer 1: its derivatives have rank 4 of the 32 (N times 4 positions)" in first
    assert "layer 2: its derivatives" in second
    assert "layer 3 (the last): its inputs have rank 4 of the 8" in last
    (means,) = failed_conditions(ng.KFAC(sharing="reduce"), geometry, ranks)
    assert "means over positions" in means
    (channel,) = failed_conditions(ng.UnitWise(), geometry, ranks)
    assert channel.startswith("layer 3 (the last): a channel has 4 independent inputs of the 8")
    many = SharedGeometry(geometry.layers, 60, 1, 0.5, geometry.positions)
    assert "layer 1: a channel has 54" in failed_conditions(ng.UnitWise(), many, ranks)[0]


def test_limits_and_leverages_of_images():
    x = images(4, SHAPE)[[0, 1, 2, 1]]
    ranks = measured_ranks(initial_signals(conv_net(SHAPE, (3,), 1), x).train)
    assert ranks.twins == (1, 3)
    low, high = ranks.leverages
    np.testing.assert_allclose([low, high], [0.5, 1.0], atol=1e-9)


def test_layers_add_up_to_the_whole(wide):
    model, x, _ = wide
    parts = layer_coefficients(ng.UnitWise(), model, x)
    whole = na.coefficient_matrix(ng.UnitWise(), model, x)
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-8, atol=1e-8)


# ----- infinite width


def test_coefficient_matrices_of_infinitely_many_channels():
    model = conv_net((4, 3, 2), (2, 2), C, strides=(1, 2), bias_variance=0.1)
    x, x_test = images(4, (4, 3, 2)), images(3, (4, 3, 2), 1)
    inside = analytic_layer_kernels(model, x)
    cross = analytic_layer_kernels(model, x_test, x)
    shift = 4 * 0.03 * np.eye(4)
    expected = {
        ng.Exact(): sum(cross) @ np.linalg.inv(sum(inside) + shift),
        ng.BlockDiagonal(): sum(
            k @ np.linalg.inv(t + shift) for k, t in zip(cross, inside, strict=True)
        ),
    }
    for structure, matrix in expected.items():
        found = na.coefficient_matrix(structure, model, x, x_test, 0.03, kernels="analytic")
        np.testing.assert_allclose(found, np.kron(matrix, np.eye(C)), rtol=1e-8, atol=1e-9)
    kernel = na.coefficient_matrix(na.GradientDescent(), model, x, kernels="analytic")
    np.testing.assert_allclose(kernel, np.kron(sum(inside) / 4, np.eye(C)), rtol=1e-12)
    found = isotropy(ng.BlockTriDiagonal(), model, x, kernels="analytic")
    assert found.theoretical_alpha == pytest.approx(1)
    assert found.is_isotropic()
    y = np.random.default_rng(0).normal(size=(4, C))
    curve = na.predict_dynamics(
        ng.BlockDiagonal(), model, x, y, 1 / 3, 1, x_test=x_test, kernels="analytic"
    )
    assert curve.train_losses[1] < 1e-20 * curve.train_losses[0]
    limit = na.predict(ng.Exact(), model, x, y, x_test, initialisations=2)
    solved = np.linalg.solve(sum(inside), y)
    np.testing.assert_allclose(limit.mean, sum(cross) @ solved, rtol=1e-8, atol=1e-10)
    assert limit.samples.shape == (2, 3, C)
    assert np.ptp(limit.samples, axis=0).min() > 0


def test_structures_without_a_limit_of_shared_weights():
    model, x = conv_net(SHAPE, (2,), 1), images(3, SHAPE)
    for structure, why in (
        (ng.KFAC(), "Gram matrices over samples and positions"),
        (ng.UnitWise(), "a channel of the first convolution"),
        (ng.Diagonal(), "no formula in the kernels of the layers"),
    ):
        with pytest.raises(ValueError, match=f'{why}.*kernels="empirical"'):
            na.coefficient_matrix(structure, model, x, kernels="analytic")
        with pytest.raises(ValueError, match="infinite-width kernel"):
            na.predict(structure, model, x, np.ones((3, 1)), x)


# ----- networks by name


def test_networks_by_name():
    options: dict[str, Any] = {"activation": "relu", "weight_variance": 1.5, "bias_variance": 0.2}
    mlp = build_network("mlp", (5,), (4, 3), 2, seed=1, **options)
    assert isinstance(mlp, ng.MLP)
    assert mlp.widths == (5, 4, 3, 2)
    net = build_network("conv-average", (8, 8, 1), (4, 3), 2, seed=1, **options)
    assert isinstance(net, ng.ConvNet)
    assert (net.pooling, net.strides, net.channels) == ("average", (1, 2), (4, 3))
    assert net.readout.weight_variance == 1.5
    assert net.readout.bias_variance == 0.2


def test_bad_networks():
    with pytest.raises(
        ValueError, match="unknown network 'conv-flat'; did you mean 'conv-flatten'"
    ):
        DynamicsSettings(dataset="digits", network="conv-flat")
    with pytest.raises(ValueError, match="conv-flatten takes images, gaussian inputs are none"):
        DynamicsSettings(dataset="gaussian", network="conv-flatten")
    with pytest.raises(ValueError, match="conv-average takes images"):
        SweepSettings("width", (4,), network="conv-average")
    with pytest.raises(ValueError, match="conv-flatten has a depth of 2 at least"):
        SweepSettings("depth", (1, 2), network="conv_flatten", dataset="digits")


def test_learning_rate_of_shared_weights(wide):
    model, x, signals = wide
    matrix = np.eye(N * C)
    for name, rate in (("block-diagonal", 1 / 3), ("kfac", 1 / 99)):
        method = methods.Method(name, 1.0, 0.0)
        found = methods.theoretical_learning_rate(method, model, N, matrix, signals.train)
        assert found == methods.LearningRate(pytest.approx(rate), "1/alpha", "")
        assert methods.theoretical_learning_rate(method, model, N, matrix) == found
    narrow = conv_net(SHAPE, (2, 2), 1)
    few = initial_signals(narrow, x).train
    found = methods.theoretical_learning_rate(method, narrow, N, 4 * np.eye(N), few)
    assert found.rule == "1/lambda_max"
    assert "layer 1: its derivatives have rank" in found.note


def test_runs_of_the_commands_on_a_conv_net(tmp_path):
    settings = DynamicsSettings(
        dataset="digits", network="conv-average", num_train=6, num_test=4, widths=(8,),
        structures=("block-diagonal",), steps=1,
    )  # fmt: skip
    found = run_dynamics(settings, tmp_path / "dynamics")
    (record,) = found.records
    assert record["learning_rate"] == pytest.approx(1 / 2)
    assert record["theory"]["train_loss"][1] < 1e-15
    assert record["network"]["train_loss"][0] == pytest.approx(record["theory"]["train_loss"][0])
    assert "ConvNet with mean pooling 8×8×1-8-1" in setting_sentence(found.document)
    sweep = SweepSettings("depth", (2,), (0,), "conv-average", num_samples=5, dataset="digits")
    names = ("exact", "block-diagonal", "kfac")
    rows = run_isotropy(IsotropySettings(sweep, names, "analytic"), tmp_path / "isotropy").records
    assert [row["theoretical_alpha"] for row in rows[:2]] == [1.0, 2.0]
    assert all(row["deviation"] < 1e-6 for row in rows[:2])
    assert "no infinite-width kernel of a ConvNet" in rows[2]["failure"]


def test_commands_know_the_networks():
    for command in ("dynamics", "isotropy"):
        result = CliRunner().invoke(app, [command, "--dataset", "digits", "--network", "conv-mean"])
        assert result.exit_code == 2
        assert "unknown network 'conv-mean'" in " ".join(result.output.split())
