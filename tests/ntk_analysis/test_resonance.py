"""Resonances of indefinite couplings, against dense eigenvalues of the damped system."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis import resonance
from ntk_analysis.empirical import initial_signals
from ntk_analysis.resonance import (
    ResonanceWarning,
    resonance_window,
    resonances,
    spectral_radius,
    warn_of_resonance,
)

INPUTS, N, OUTPUTS = 10, 5, 2
rng = np.random.default_rng(3)
X = rng.normal(size=(N, INPUTS)) / np.sqrt(INPUTS)
Y = rng.normal(size=(N, OUTPUTS))
INDEFINITE = ng.LayerWise([[1.0, 2.0, 0.0], [2.0, 1.0, 0.3], [0.0, 0.3, 1.5]])


def make_model(depth: int) -> ng.MLP:
    widths = (INPUTS, *[16] * (depth - 1), OUTPUTS)
    return ng.MLP(widths, activation="tanh", bias_variance=0.3, rngs=nnx.Rngs(depth))


def product(structure: ng.LayerWise, depth: int) -> np.ndarray:
    """(Sigma (x) I) blockdiag(K_l) / N as it stands, not symmetric."""
    kernels = na.empirical_layer_kernels(make_model(depth), X)
    sigma = structure.coupling(depth)
    return np.block([[s * k for s, k in zip(row, kernels, strict=True)] for row in sigma]) / N


@pytest.mark.parametrize(
    ("structure", "depth", "negative"),
    [
        (ng.BlockTriDiagonal(), 3, 1),
        (ng.BlockTriDiagonal(), 4, 1),
        (ng.BlockTriDiagonal(), 5, 1),
        (ng.BlockTriDiagonal(), 6, 2),
        (INDEFINITE, 3, 1),
    ],
)
def test_against_the_eigenvalues_of_the_product(structure, depth, negative):
    values = np.linalg.eigvals(product(structure, depth))
    assert np.abs(values.imag).max() < 1e-10
    wanted = np.sort(-values.real[values.real < -1e-9])
    found = resonances(structure, make_model(depth), X)
    # Sylvester: as many for each negative eigenvalue of Sigma as there are outputs
    assert len(found) == negative * N * OUTPUTS
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-12)
    assert resonance_window(structure, make_model(depth), X) == (found[0], found[-1])


@pytest.mark.parametrize(
    ("structure", "depth"),
    [
        (ng.BlockTriDiagonal(), 2),
        (ng.BlockDiagonal(), 3),
        (ng.LayerWise([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]]), 3),
        (ng.Exact(), 3),
        (ng.KFAC(), 3),
        (na.GradientDescent(), 3),
    ],
)
def test_semidefinite_structures_have_none(structure, depth):
    assert len(resonances(structure, make_model(depth), X)) == 0
    assert resonance_window(structure, make_model(depth), X) is None


@pytest.mark.parametrize("structure", [ng.BlockTriDiagonal(), INDEFINITE])
def test_the_coefficient_matrix_has_poles_exactly_there(structure):
    model = make_model(3)
    rate = 0.5 * ng.optimal_learning_rate(structure, model, N)
    found = resonances(structure, model, X)
    # a pole: ten times closer, ten times the radius
    for rho in (found[0], found[len(found) // 2], found[-1]):
        near = spectral_radius(structure, model, X, rate, rho * (1 + np.array([1e-6, 1e-7])))
        assert near[0] > 100
        assert near[1] / near[0] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("depth", [3, 4])
def test_radius_without_resonance(depth):
    model, structure = make_model(depth), ng.BlockTriDiagonal()
    rate = 0.5 * ng.optimal_learning_rate(structure, model, N)
    low, high = resonance_window(structure, model, X)
    # isotropic at zero damping: |1 - eta alpha|; and back to it well below the window
    undamped, tiny, large = spectral_radius(
        structure, model, X, rate, [0.0, 1e-4 * low, 1e3 * high]
    )
    assert undamped == pytest.approx(0.5, abs=1e-9)
    assert tiny == pytest.approx(0.5, abs=1e-2)
    assert 0.5 < large < 1


def test_radius_decides_the_fate_of_training():
    model, structure = make_model(4), ng.BlockTriDiagonal()
    middle = float(resonances(structure, model, X)[N * OUTPUTS // 2])
    fates = []
    for rate, rho in ((0.25, 0.0), (2.0, 0.0), (0.25, 100 * middle), (0.25, middle * 1.001)):
        (radius,) = spectral_radius(structure, model, X, rate, [rho])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResonanceWarning)
            losses = na.predict_dynamics(structure, model, X, Y, rate, 20, rho).train_losses
        assert (losses[-1] < losses[0]) == (radius < 1)
        fates.append(radius < 1)
    assert fates == [True, False, True, False]


def test_the_singular_coupling_of_five_layers():
    model, structure = make_model(5), ng.BlockTriDiagonal()
    with pytest.warns(ng.SingularCouplingWarning):
        radii = spectral_radius(structure, model, X, 0.25, [0.0, 1e-9])
    # the pseudo-inverse and the limit of small damping are both isotropic with alpha = 2
    np.testing.assert_allclose(radii, 0.5, atol=1e-4)


def test_radii_of_other_structures():
    model = make_model(3)
    kernel = na.coefficient_matrix(na.GradientDescent(), model, X)
    (found,) = spectral_radius(na.GradientDescent(), model, X, 0.7, [0.0])
    assert found == pytest.approx(np.abs(1 - 0.7 * np.linalg.eigvalsh(kernel)).max(), rel=1e-10)
    matrix = na.coefficient_matrix(ng.UnitWise(), model, X, damping=1e-2)
    found = spectral_radius(ng.UnitWise(), model, X, 0.05, [0.0, 1e-2])
    wanted = np.abs(1 - 0.05 * np.linalg.eigvals(matrix)).max()
    assert found[1] == pytest.approx(wanted, rel=1e-9)


def test_the_warning(monkeypatch):
    model, structure = make_model(4), ng.BlockTriDiagonal()
    signals = initial_signals(model, X).train
    low, high = resonance_window(structure, model, X)
    inside = float(np.sqrt(low * high))
    with jax.enable_x64(True):
        scale = float(structure.damping_scale(signals))
    message = rf"{inside:.3g} of BlockTriDiagonal .* {low:.3g} to {high:.3g}.*Use damping=0"
    with pytest.warns(ResonanceWarning, match=message):
        na.predict_dynamics(structure, model, X, Y, 0.25, 1, inside)
    with pytest.warns(ResonanceWarning, match=message):
        warn_of_resonance(structure, signals, ng.RelativeDamping(inside / scale))
    # warnings are errors here, so these must give none
    na.predict_dynamics(structure, model, X, Y, 0.25, 1, 2 * high)
    for quiet in (0.0, 0.5 * low, 2 * high, ng.RelativeDamping(2 * high / scale)):
        warn_of_resonance(structure, signals, quiet)
    for other in (ng.BlockDiagonal(), ng.Exact(), na.GradientDescent()):
        warn_of_resonance(other, signals, inside)
    monkeypatch.setattr(resonance, "LARGEST_CHECK", 4 * N * OUTPUTS - 1)
    warn_of_resonance(structure, signals, inside)


def test_bad_arguments():
    model = make_model(3)
    with pytest.raises(TypeError, match="structure"):
        resonances("exact", model, X)
    with pytest.raises(ValueError, match="sigma is 3 x 3"):
        resonances(INDEFINITE, make_model(4), X)
    with pytest.raises(ValueError, match="damping must be 0 or positive"):
        spectral_radius(ng.Exact(), model, X, 1.0, [-1.0])
    with pytest.raises(ValueError, match="sequence"):
        spectral_radius(ng.Exact(), model, X, 1.0, 0.1)
    with pytest.raises(ValueError, match="learning_rate"):
        spectral_radius(ng.Exact(), model, X, 0.0, [0.1])
    with pytest.raises(ValueError, match="takes no damping"):
        spectral_radius(na.GradientDescent(), model, X, 1.0, [0.1])
