"""Entries and flops of the structures, against dense matrices and counts by hand."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.learning_rate import model_geometry
from natgrad_flax.structures import Geometry
from ntk_analysis.cost import gradient_flops, structure_cost
from ntk_analysis.empirical import initial_signals
from ntk_analysis.methods import STRUCTURES

N = 5
SPARSE = ng.LayerWise([[1, 0, 0.5], [0, 2, 0], [0.5, 0, 0]])
ENTRY_WISE = {"quasi-diagonal"}


def make_model(outputs: int = 1, bias: float = 0.3) -> ng.MLP:
    return ng.MLP((3, 4, 5, outputs), activation="gelu", bias_variance=bias, rngs=nnx.Rngs(0))


def signals_of(model: ng.MLP):
    x = np.random.default_rng(0).uniform(0.5, 1.5, size=(N, 3)).astype(np.float32)
    return initial_signals(model, x).train


def geometry(widths, n=100, bias=False, active=1.0) -> Geometry:
    layers = tuple((k + bias, m) for k, m in itertools.pairwise(widths))
    return Geometry(layers, n, widths[-1], active)


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("name", [*sorted(set(STRUCTURES) - ENTRY_WISE), "sparse"])
def test_nonzeros_of_dense_matrices(name, bias, x64):
    structure = SPARSE if name == "sparse" else STRUCTURES[name]
    model = make_model(bias=bias)
    dense = np.asarray(structure.to_dense(signals_of(model)))
    found = structure_cost(structure, model_geometry(model, N))
    assert found.num_params == len(dense)
    assert found.nonzeros == np.count_nonzero(dense)
    assert found.fraction_of_exact == np.count_nonzero(dense) / dense.size


@pytest.mark.parametrize("name", sorted(set(STRUCTURES) - {"kfac", "ekfac", "gd", *ENTRY_WISE}))
def test_symmetric_pairs_are_stored_once(name, x64):
    model = make_model()
    dense = np.asarray(STRUCTURES[name].to_dense(signals_of(model)))
    found = structure_cost(STRUCTURES[name], model_geometry(model, N))
    assert found.stored == np.count_nonzero(np.tril(dense))


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_the_inverse_of_the_quasi_diagonal_metric_is_an_arrow(bias, x64):
    model = make_model(bias=bias)
    structure = ng.QuasiDiagonal()
    inverse = np.linalg.inv(np.asarray(structure.to_dense(signals_of(model), 0.1)))
    large = np.abs(inverse) > 1e-11 * np.abs(inverse).max()
    found = structure_cost(structure, model_geometry(model, N))
    assert found.nonzeros == np.count_nonzero(large)
    assert found.stored == np.count_nonzero(np.tril(large))


def test_what_kfac_ekfac_and_gradient_descent_store():
    found = structure_cost(ng.KFAC(), geometry((3, 4, 1)))
    assert found.stored == (6 + 10) + (10 + 1)
    assert found.nonzeros == 12**2 + 4**2
    found = structure_cost(ng.EKFAC(), geometry((3, 4, 1)))
    assert found.stored == (9 + 16 + 12) + (16 + 1 + 4)
    assert found.nonzeros == 12**2 + 4**2
    found = structure_cost(na.GradientDescent(), geometry((3, 4, 1)))
    assert (found.nonzeros, found.stored) == (16, 0)
    assert found.inversion_flops == 0


def test_zeros_between_outputs_are_counted_all_the_same(x64):
    model = make_model(outputs=3)
    dense = np.asarray(ng.Exact().to_dense(signals_of(model)))
    found = structure_cost(ng.Exact(), model_geometry(model, N))
    assert found.nonzeros - np.count_nonzero(dense) == 3 * 2 * 6**2


@pytest.mark.parametrize(("width", "depth"), [(200, 3), (500, 5), (1000, 4)])
def test_unit_wise_fraction_of_wide_networks(width, depth):
    found = structure_cost(ng.UnitWise(), geometry((*[width] * depth, 1)))
    np.testing.assert_allclose(found.fraction_of_exact, 1 / (width * (depth - 1)), rtol=0.1)


def test_order_of_the_entries():
    wide = geometry((100, 256, 256, 1), bias=True)
    names = ("gd", "quasi-diagonal", "unit-wise", "block-diagonal", "block-tri-diagonal", "exact")
    counts = [structure_cost(STRUCTURES[name], wide).nonzeros for name in names]
    assert counts == sorted(counts)
    assert structure_cost(ng.KFAC(), wide).stored < structure_cost(ng.UnitWise(), wide).stored


def test_large_networks_do_not_overflow():
    huge = geometry((10**6, 10**6, 10**6, 1))
    params = 2 * 10**12 + 10**6
    assert structure_cost(ng.Exact(), huge).nonzeros == params**2
    assert structure_cost(ng.BlockTriDiagonal(), huge).nonzeros == (params**2 - 2 * 10**12 * 10**6)


def test_flops_by_hand():
    n, m0, m = 10, 30, 50
    sizes = geometry((m0, m, 1), n)
    forward = backward_to_parameters = 2 * n * (m0 * m + m)
    derivatives, combine = 2 * n * m, 2 * n * (m + 1)
    gradient = forward + derivatives + combine + backward_to_parameters
    assert gradient_flops(sizes) == gradient
    assert structure_cost(na.GradientDescent(), sizes).step_flops == gradient

    def inversion(structure, damped=False, of=sizes):
        found = structure_cost(structure, of, damped=damped)
        assert found.step_flops == gradient_flops(of) + found.inversion_flops
        return found.inversion_flops

    grams = 2 * n**2 * (m0 + m + m + 1)
    cholesky = n**3 / 3 + 2 * n**2
    np.testing.assert_allclose(inversion(ng.Exact()), grams + cholesky)
    for damped in (False, True):
        np.testing.assert_allclose(inversion(ng.BlockDiagonal(), damped), grams + 2 * cholesky)
    coupled = ng.LayerWise([[2, 1], [1, 2]])
    np.testing.assert_allclose(inversion(coupled), grams + 2 * cholesky)
    np.testing.assert_allclose(
        inversion(coupled, True), grams + (2 * n) ** 3 / 3 + 2 * (2 * n) ** 2
    )
    indefinite = ng.LayerWise([[1, 2], [2, 1]])
    np.testing.assert_allclose(
        inversion(indefinite, True), grams + 2 * (2 * n) ** 3 / 3 + 2 * (2 * n) ** 2
    )
    np.testing.assert_allclose(inversion(ng.Diagonal()), 2 * n * (m + 1) + 2 * n * (m0 * m + m))
    # one output: the derivatives of the last layer are a 1 x 1 factor
    np.testing.assert_allclose(
        inversion(ng.KFAC()),
        2 * n**2 * (m0 + m)
        + 2 * n**3
        + 2 * n**2 * (m + 1)
        + (2 * n**2 * m + n**3 + 2 * n**2 * m)
        + (2 * n + 1 / 3 + 2 * n),
    )

    def basis(side):
        return 4 * side * n**2 - 4 * n**3 / 3 + 11 * n**3 + 2 * side * n**2

    def eigenvalues(k, units, r):
        turned = 2 * n * k * n + 2 * n * units * r + 2 * n * n * r
        return turned + 2 * n * n * units + 4 * n * units * r

    np.testing.assert_allclose(
        inversion(ng.EKFAC()),
        basis(m0) + basis(m) + eigenvalues(m0, m, n)
        + basis(m) + (2 * n + 9) + eigenvalues(m, 1, 1),
    )  # fmt: skip
    shared = 2 * n**3 / 3 + 2 * n**2 * (m + 1)
    inputs = 2 * n**2 * (m0 + m) + 2 * n * (m + 1)
    np.testing.assert_allclose(inversion(ng.UnitWise()), inputs + shared)
    np.testing.assert_allclose(inversion(ng.UnitWise(), True), inputs + (m + 1) * cholesky)
    relu = geometry((m0, m, 1), n, active=0.5)
    np.testing.assert_allclose(inversion(ng.UnitWise(), of=relu), inputs + m * cholesky + cholesky)


def test_biases_make_the_quasi_diagonal_dearer():
    without, beside = geometry((30, 50, 1)), geometry((30, 50, 1), bias=True)
    costs = [structure_cost(s, without).step_flops for s in (ng.Diagonal(), ng.QuasiDiagonal())]
    assert costs[0] == costs[1]
    costs = [structure_cost(s, beside).step_flops for s in (ng.Diagonal(), ng.QuasiDiagonal())]
    np.testing.assert_allclose(costs[1] - costs[0], 2 * 100 * (30 * 50 + 50))


def test_only_used_layers_of_an_undamped_tri_diagonal_metric_cost():
    # Sigma^{-1} 1 = (0, 1, 0)
    sizes = geometry((300, 400, 400, 1))
    middle = 2 * 100**2 * 800 + 100**3 / 3 + 2 * 100**2
    np.testing.assert_allclose(structure_cost(ng.BlockTriDiagonal(), sizes).inversion_flops, middle)


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_cost_of_very_wide_networks(name, damped):
    """Over the flops of a gradient, 10 N M^2 here: an entry a parameter adds 2 N (2 M^2)."""
    limit = {"diagonal": 1.4, "quasi-diagonal": 1.8}.get(name, 1.0)
    errors = []
    for width in (10**3, 10**4, 10**5, 10**6):
        sizes = geometry((width, width, width, 1), n=50, bias=True)
        found = structure_cost(STRUCTURES[name], sizes, damped=damped)
        errors.append(abs(found.step_flops / gradient_flops(sizes) - limit))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("outputs", [1, 10])
def test_samples_times_outputs_set_the_cubic_part(outputs):
    small, large = (geometry((9, 9, outputs), n) for n in (10**4, 2 * 10**4))
    for name in ("exact", "block-diagonal", "block-tri-diagonal"):
        ratio = (
            structure_cost(STRUCTURES[name], large, damped=True).inversion_flops
            / structure_cost(STRUCTURES[name], small, damped=True).inversion_flops
        )
        np.testing.assert_allclose(ratio, 8, rtol=0.02)
    # a small network is inverted on its parameter side by K-FAC
    ratio = (
        structure_cost(ng.KFAC(), large).inversion_flops
        / structure_cost(ng.KFAC(), small).inversion_flops
    )
    np.testing.assert_allclose(ratio, 2, rtol=0.02)


def test_singular_coupling_costs_its_step_of_least_norm():
    # Sigma^+ 1 = (1, 1, 0, 1, 1) / 2, and layers 1, 2, 4 and 5 carry the null vector of Sigma
    n, width = 100, 200
    sizes = geometry((width, width, width, width, width, 1), n)
    grams = 2 * n**2 * (2 * width) * 3 + 2 * n**2 * (width + 1)
    cholesky = n**3 / 3 + 2 * n**2
    np.testing.assert_allclose(
        structure_cost(ng.BlockTriDiagonal(), sizes).inversion_flops,
        grams + 5 * cholesky + 4 * n**3,
    )


def test_bad_arguments():
    sizes = geometry((30, 50, 1))
    with pytest.raises(TypeError, match="structure must be"):
        structure_cost("exact", sizes)
    with pytest.raises(ValueError, match="2 layers"):
        structure_cost(ng.LayerWise(np.eye(3)), sizes)
    with pytest.raises(ValueError, match="single layer"):
        structure_cost(ng.QuasiDiagonal(), geometry((30, 1)))

    class Unknown(na.GradientDescent.__base__):
        solve = precondition = coefficient = to_dense = damping_scale = alpha = (
            failed_conditions
        ) = lambda self, *arguments: jnp.zeros(())

    with pytest.raises(TypeError, match="Unknown is not known"):
        structure_cost(Unknown(), sizes)
