"""Isotropy reports and measured conditions, against explicit matrices and closed forms."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.conditions import LayerRanks, failed_conditions, measured_ranks
from ntk_analysis.empirical import initial_signals
from ntk_analysis.isotropy import isotropy, isotropy_of

INPUTS, N = 12, 6
ALL = {
    "gd": na.GradientDescent(),
    "exact": ng.Exact(),
    "block-diagonal": ng.BlockDiagonal(),
    "block-tri-diagonal": ng.BlockTriDiagonal(),
    "kfac": ng.KFAC(),
    "unit-wise": ng.UnitWise(),
    "diagonal": ng.Diagonal(),
    "quasi-diagonal": ng.QuasiDiagonal(),
}


def make_model(widths=(INPUTS, 24, 24, 1), activation="tanh", bias=0.3, seed=0) -> ng.MLP:
    return ng.MLP(widths, activation=activation, bias_variance=bias, rngs=nnx.Rngs(seed))


def make_inputs(count: int = N, dim: int = INPUTS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def conditions(structure, model, x) -> tuple[str, ...]:
    return isotropy(structure, model, x).failed_conditions


def dense_jacobian(model: ng.MLP, x: np.ndarray) -> np.ndarray:
    """(N C, P) by automatic differentiation; each layer its kernel row by row, then its bias."""
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
    tree = jax.jacobian(lambda s: nnx.merge(graphdef, s)(jnp.asarray(x, jnp.float64)))(state)
    rows = len(x) * model.widths[-1]
    return np.concatenate(
        [
            np.asarray(leaf).reshape(rows, -1)
            for index in range(model.depth)
            for leaf in (tree["layers"][index]["kernel"][...], tree["layers"][index]["bias"][...])
        ],
        axis=1,
    )


@pytest.mark.parametrize(
    ("name", "damping"),
    [("gd", 0.0), *itertools.product([name for name in ALL if name != "gd"], [0.0, 1e-2])],
)
def test_spectrum_against_explicit_inverses(name, damping, x64):
    model, x = make_model((5, 9, 8, 2)), make_inputs(3, 5)
    jacobian = dense_jacobian(model, x)
    metric = np.asarray(ALL[name].to_dense(initial_signals(model, x).train, damping))
    inverse = np.linalg.pinv(metric, rcond=1e-11, hermitian=True)
    expected = np.linalg.eigvalsh(jacobian @ inverse @ jacobian.T / len(x))
    found = isotropy(ALL[name], model, x, damping)
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.alpha, expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        found.condition_number, np.abs(expected).max() / np.abs(expected).min(), rtol=1e-6
    )
    np.testing.assert_allclose(
        found.deviation, np.abs(expected / expected.mean() - 1).max(), rtol=1e-6, atol=1e-7
    )
    assert found.asymmetry < 1e-9
    assert found.eigenvalues.dtype == np.float64


@pytest.mark.parametrize(
    ("structure", "alpha"),
    [
        (ng.Exact(), 1),
        (ng.BlockDiagonal(), 3),
        (ng.BlockTriDiagonal(), 1),
        (ng.LayerWise([[2, 0, 0], [0, 1, 0], [0, 0, 4]]), 1.75),
        (ng.KFAC(), 3 * N),
        (ng.KFAC(last_layer="literal"), 2 * N + 1),
        (ng.UnitWise(), 2 * 24 + 1),
    ],
)
def test_alpha_of_theory(structure, alpha):
    found = isotropy(structure, make_model(), make_inputs())
    np.testing.assert_allclose(found.alpha, alpha, rtol=1e-8)
    np.testing.assert_allclose(found.theoretical_alpha, alpha, rtol=1e-12)
    np.testing.assert_allclose(found.learning_rate, 1 / alpha, rtol=1e-12)
    np.testing.assert_allclose(found.condition_number, 1, rtol=1e-6)
    assert found.is_isotropic()
    assert found.failed_conditions == ()
    assert found.structure == structure.name


def test_relu_units_count_where_they_are_active():
    model, x = make_model((INPUTS, 200, 200, 1), "relu", bias=0.0), make_inputs()
    active = np.ones(N)
    hidden = x
    for layer in model.layers[:-1]:
        hidden = np.asarray(jax.nn.relu(layer(hidden)))
        active += (hidden > 0).sum(axis=1)
    found = isotropy(ng.UnitWise(), model, x)
    np.testing.assert_allclose(found.eigenvalues, np.sort(active), rtol=1e-9)
    assert found.theoretical_alpha == 201
    assert not found.is_isotropic()
    assert found.is_isotropic(tolerance=0.3)


def test_unit_wise_with_few_inputs():
    n, dim, width = 10, 4, 40
    model, x = make_model((dim, width, width, 1), bias=0.0), make_inputs(n, dim)
    found = isotropy(ng.UnitWise(), model, x)
    # each unit of layer 1 adds a projector of rank M_0, each of layer 2 and 3 one of rank N
    np.testing.assert_allclose(found.alpha, width * dim / n + width + 1, rtol=1e-6)
    assert found.failed_conditions == (
        "layer 1: its inputs have rank 4 of the 10 that UnitWise needs: use at least 10 inputs, or "
        "fewer samples",
    )
    assert found.learning_rate == 1 / found.eigenvalues[-1]


def test_gradient_descent_has_the_condition_number_of_the_kernel():
    model, x = make_model(), make_inputs()
    kernel = sum(na.empirical_layer_kernels(model, x))
    found = isotropy(na.GradientDescent(), model, x)
    np.testing.assert_allclose(found.condition_number, np.linalg.cond(kernel), rtol=1e-9)
    np.testing.assert_allclose(found.learning_rate, N / np.linalg.eigvalsh(kernel)[-1], rtol=1e-9)
    assert found.theoretical_alpha is None


def test_a_damped_tri_diagonal_metric_can_be_indefinite(x64):
    model, x = make_model((INPUTS, 24, 24, 24, 1)), make_inputs()
    jacobian = dense_jacobian(model, x)
    metric = np.asarray(ng.BlockTriDiagonal().to_dense(initial_signals(model, x).train))
    values = np.linalg.eigvalsh(metric)
    # just short of the damping that makes the metric singular
    damping = 0.99 * np.abs(values[values < -1e-6]).min()
    inverse = np.linalg.inv(metric + damping * np.eye(len(metric)))
    expected = np.linalg.eigvalsh(jacobian @ inverse @ jacobian.T / N)
    found = isotropy(ng.BlockTriDiagonal(), model, x, damping)
    assert expected[0] < -1
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-6)
    sizes = np.abs(expected)
    np.testing.assert_allclose(found.condition_number, sizes.max() / sizes.min(), rtol=1e-6)


def test_narrow_layers_fail_nothing_at_infinite_width():
    model, x = make_model((INPUTS, 24, 2, 1), bias=0.0), make_inputs()
    assert conditions(ng.BlockDiagonal(), model, x) != ()
    found = isotropy(ng.BlockDiagonal(), model, x, kernels="analytic")
    assert found.failed_conditions == ()
    np.testing.assert_allclose(found.eigenvalues, 3, rtol=1e-6)
    assert found.learning_rate == 1 / 3
    kernel = na.coefficient_matrix(na.GradientDescent(), model, x, kernels="analytic")
    found = isotropy(na.GradientDescent(), model, x, kernels="analytic")
    np.testing.assert_allclose(found.condition_number, np.linalg.cond(kernel), rtol=1e-9)


def test_a_last_layer_that_is_too_narrow():
    model, x = make_model((INPUTS, 24, 4, 1), bias=0.0), make_inputs()
    sentence = (
        "layer 3 (the last): its inputs have rank 4 of the 6 that {} needs: use at least 6 hidden "
        "units in the layer before it, or fewer samples"
    )
    found = isotropy(ng.BlockDiagonal(), model, x)
    assert found.failed_conditions == (sentence.format("BlockDiagonal"),)
    # two layers give I each, the last a projector of rank 4
    np.testing.assert_allclose(found.eigenvalues, [2, 2, 3, 3, 3, 3], rtol=1e-7)
    np.testing.assert_allclose(found.condition_number, 1.5, rtol=1e-7)
    assert found.theoretical_alpha == 3
    np.testing.assert_allclose(found.learning_rate, 1 / 3, rtol=1e-7)
    assert conditions(ng.UnitWise(), model, x) == (sentence.format("UnitWise"),)
    assert conditions(ng.Exact(), model, x) == ()
    kfac = conditions(ng.KFAC(), model, x)
    assert kfac[0].startswith("layer 2: its derivatives have rank 4 of the 6 that KFAC needs")
    assert "at least 6 units in this layer" in kfac[0]
    assert kfac[1] == sentence.format("KFAC")


def test_a_network_with_too_few_parameters():
    model, x = make_model((3, 2, 1), bias=0.0), make_inputs(10, 3)
    (sentence,) = conditions(ng.Exact(), model, x)
    assert "row rank 8 of the 10" in sentence
    assert "has 8 parameters" in sentence
    layers = conditions(ng.BlockDiagonal(), model, x)
    assert len(layers) == 2
    assert layers[0].startswith("layer 1: its Jacobian has row rank 6 of the 10")
    assert "it has 6 parameters" in layers[0]


def test_outputs_behind_a_bottleneck():
    model, x = make_model((INPUTS, 24, 1, 2)), make_inputs(2)
    first = conditions(ng.BlockDiagonal(), model, x)[0]
    assert "2 outputs reach it through 1 units" in first
    assert "row rank 2 of the 4" in first


def test_repeated_samples_are_found():
    model, x = make_model(), make_inputs()
    x[4] = x[1]
    assert isotropy(na.GradientDescent(), model, x).condition_number == np.inf
    (sentence,) = conditions(ng.Exact(), model, x)
    assert "row rank 5 of the 6" in sentence
    assert "samples 1 and 4 (counted from 0) are the same" in sentence
    for structure in (ng.BlockDiagonal(), ng.UnitWise(), ng.KFAC()):
        found = isotropy(structure, model, x)
        assert not found.is_isotropic()
        assert [text.split(":")[0] for text in dict.fromkeys(found.failed_conditions)][-1] == (
            "layer 3 (the last)"
        )
        assert "rank 5 of the 6" in found.failed_conditions[-1]
        np.testing.assert_allclose(found.learning_rate, 1 / found.eigenvalues[-1], rtol=1e-12)


def test_linearly_dependent_samples():
    model, x = make_model(bias=0.0), make_inputs()
    x[5] = x[0] - x[1]
    (sentence,) = conditions(ng.UnitWise(), model, x)
    assert sentence.startswith("layer 1: its inputs have rank 5 of the 6 that UnitWise needs")
    assert "use other features" in sentence
    # the products with D make up for it in the Jacobian
    assert conditions(ng.BlockDiagonal(), model, x) == ()


def test_a_linear_network_spreads_low_rank():
    model, x = make_model(activation="identity", bias=0.0), make_inputs()
    x[5] = x[0] - x[1]
    unit = conditions(ng.UnitWise(), model, x)
    assert [text.split(":")[0] for text in unit] == ["layer 1", "layer 2", "layer 3 (the last)"]
    assert "another activation" in unit[1]
    derivatives = [t for t in conditions(ng.KFAC(), model, x) if "derivatives have rank 1" in t]
    assert len(derivatives) == 2


def test_forster_transform_makes_kfac_isotropic():
    n, dim = 8, 3
    model, x = make_model((dim, 24, 24, 1), bias=0.0), make_inputs(n, dim)
    found = isotropy(ng.KFAC(), model, x)
    (sentence,) = found.failed_conditions
    assert "rank 3 for 8 samples" in sentence
    assert "forster_transform" in sentence
    assert not found.is_isotropic(1e-2)
    np.testing.assert_allclose(found.alpha, 2 * n + dim, rtol=1e-6)
    transformed = natgrad_datasets.forster_transform(x).x_train.astype(np.float32)
    found = isotropy(ng.KFAC(), model, transformed)
    assert found.failed_conditions == ()
    assert found.is_isotropic(1e-2)
    assert found.theoretical_alpha == 2 * n + dim
    assert found.learning_rate == 1 / (2 * n + dim)


def test_ranks_of_a_network():
    model, x = make_model((INPUTS, 24, 4, 2), bias=0.0), make_inputs()
    ranks = measured_ranks(initial_signals(model, x).train)
    assert ranks.layers == (
        LayerRanks(inputs=6, derivatives=12, jacobian=12),
        LayerRanks(inputs=6, derivatives=4, jacobian=12),
        LayerRanks(inputs=4, derivatives=2, jacobian=8),
    )
    assert ranks.kernel == 12
    assert ranks.twins is None
    np.testing.assert_allclose(ranks.leverages, 1, rtol=1e-9)


def test_structures_without_conditions():
    model, x = make_model((3, 2, 1)), make_inputs(10, 3)
    signals = initial_signals(model, x)
    ranks, geometry = measured_ranks(signals.train), model_geometry(model, 10)
    for name in ("gd", "diagonal", "quasi-diagonal"):
        assert failed_conditions(ALL[name], geometry, ranks) == ()


def test_signals_at_hand_serve_all_structures():
    model, x = make_model(), make_inputs()
    # test samples are no part of the training kernel
    signals = initial_signals(model, x, make_inputs(3, seed=1))
    geometry, ranks = model_geometry(model, N), measured_ranks(signals.train)
    for name in ("gd", "kfac"):
        shared = isotropy_of(ALL[name], signals, geometry, ranks=ranks)
        np.testing.assert_allclose(
            shared.eigenvalues, isotropy(ALL[name], model, x).eigenvalues, rtol=1e-9
        )


def test_singular_tri_diagonal_coupling_is_isotropic_undamped():
    model, x = make_model((INPUTS, 24, 24, 24, 24, 1)), make_inputs()
    with pytest.warns(ng.SingularCouplingWarning):
        found = isotropy(ng.BlockTriDiagonal(), model, x)
    np.testing.assert_allclose(found.eigenvalues, 2, rtol=1e-6)
    np.testing.assert_allclose(found.theoretical_alpha, 2, rtol=1e-12)


def test_unknown_activation_means_no_alpha_of_units():
    class Network(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Linear(INPUTS, 16, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(16, 1, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    found = isotropy(ng.UnitWise(), Network(), make_inputs())
    assert found.theoretical_alpha is None
    np.testing.assert_allclose(found.alpha, 17, rtol=1e-8)
    np.testing.assert_allclose(found.learning_rate, 1 / 17, rtol=1e-6)


def test_bad_arguments():
    model, x = make_model(), make_inputs()
    with pytest.raises(TypeError, match="instance"):
        isotropy(ng.Exact, model, x)
    with pytest.raises(ValueError, match="damping"):
        isotropy(ng.Exact(), model, x, damping=-1.0)
    with pytest.raises(ValueError, match="takes no damping"):
        isotropy(na.GradientDescent(), model, x, damping=0.1)
    with pytest.raises(ValueError, match="kernels"):
        isotropy(ng.Exact(), model, x, kernels="numeric")
    with pytest.raises(ValueError, match="takes inputs of shape"):
        isotropy(ng.Exact(), model, x[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        isotropy(ng.Exact(), model, np.full_like(x, np.nan))
    with pytest.raises(ValueError, match="full row rank"):
        isotropy(ng.BlockTriDiagonal(), make_model((INPUTS, 24, 4, 1), bias=0.0), x)
    with pytest.raises(ValueError, match="3 layers"):
        isotropy(ng.LayerWise(np.eye(2)), model, x)


def test_the_global_precision_stays():
    isotropy(ng.Exact(), make_model(), make_inputs())
    assert not jax.config.jax_enable_x64
