"""Entries and flops of the structures, against dense matrices and counts by hand."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.optimizer.learning_rate import model_geometry
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
    found = structure_cost(ng.UnitWise(), geometry((*[width] * depth, 1), n=8))
    np.testing.assert_allclose(found.fraction_of_exact, 1 / (width * (depth - 1)), rtol=0.1)


def test_order_of_the_entries():
    wide = geometry((100, 256, 256, 1), n=8, bias=True)
    names = ("gd", "quasi-diagonal", "unit-wise", "block-diagonal", "block-tri-diagonal", "exact")
    counts = [structure_cost(STRUCTURES[name], wide).nonzeros for name in names]
    assert counts == sorted(counts)
    assert structure_cost(ng.KFAC(), wide).stored < structure_cost(ng.UnitWise(), wide).stored


def test_large_networks_do_not_overflow():
    huge = geometry((10**6, 10**6, 10**6, 1))
    params = 2 * 10**12 + 10**6
    assert structure_cost(ng.Exact(), huge).nonzeros == params**2
    assert structure_cost(ng.BlockTriDiagonal(), huge).nonzeros == (params**2 - 2 * 10**12 * 10**6)


def test_flops_of_a_gradient_by_hand():
    n, m0, m, c = 10, 30, 50, 3
    sizes = geometry((m0, m, c), n)
    forward = backward_to_parameters = 2 * n * (m0 * m + m * c)
    derivatives, combine, mean = 2 * n * c * m * c, 2 * n * c * (m + c), n * (m + c)
    gradient = forward + derivatives + combine + backward_to_parameters + mean
    assert gradient_flops(sizes) == gradient
    assert structure_cost(na.GradientDescent(), sizes).step_flops == gradient
    for structure in (ng.Exact(), ng.KFAC()):
        found = structure_cost(structure, sizes)
        assert found.step_flops == gradient + found.inversion_flops


def cholesky(side, columns=1):
    return side**3 / 3 + 2 * side**2 * columns


def leading_order(name, n, m, depth, damped):
    """What is added to a gradient by sizes alone, for layers (m, m) and one output, n < m."""
    widths = [*[m] * (depth - 1), 1]
    grams = sum(2 * n**2 * (m + units) for units in widths)
    if name == "exact":
        return grams + cholesky(n)
    if name == "block-diagonal":
        return grams + depth * cholesky(n)
    if name == "coupled":
        return grams + (cholesky(depth * n) if damped else depth * cholesky(n))
    if name == "indefinite":
        side = depth * n
        return grams + (2 * side**3 / 3 + 2 * side**2 if damped else depth * cholesky(n))
    if name == "kfac":
        # a factor, its inverse, and X^T X for X the inverse; all in full for few samples
        inverse = n**3 / 3 + n**3 + 2 * n**3
        hidden = 2 * (2 * n**2 * m + inverse) + 2 * n**2 * m + 2 * n**2 * m
        # the last layer has one unit: no inverse for it
        return (depth - 1) * hidden + 2 * n**2 * m + cholesky(n) + 2 * n**2
    if name == "ekfac":
        basis = 4 * m * n**2 - 4 * n**3 / 3 + 2 * n**3 + 9 * n**3 + 2 * m * n**2
        # a and twice D in their bases, S*, and the gradient into both bases and out of one: the way
        # out of the other is in place of the gradient's last product
        hidden = 2 * basis + 3 * 2 * n**2 * m + 2 * n**3 + 3 * 2 * n**2 * m
        return (depth - 1) * hidden + basis + 2 * n**2 * m + 4 * n**2
    if name == "unit-wise":
        factors = [units * cholesky(n) if damped else cholesky(n, units) for units in widths]
        return sum(2 * n**2 * m + 2 * n * units for units in widths) + sum(factors)
    products = {"diagonal": 1, "quasi-diagonal": 2}[name]
    return products * sum(2 * n * m * units for units in widths)


REFERENCES = {
    "coupled": ng.LayerWise([[2, 1, 0], [1, 2, 1], [0, 1, 2]]),
    "indefinite": ng.LayerWise([[1, 2, 0], [2, 1, 0], [0, 0, 1]]),
}


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("exact", "block-diagonal", "coupled", "indefinite", "kfac", "ekfac"),
        *("unit-wise", "diagonal", "quasi-diagonal"),
    ],
)
def test_counts_are_the_leading_order_of_theory(name, damped):
    """Below 512 rows, from where Gram matrices are halved; undamped, ranks are looked at."""
    n, m = 100, 400
    structure = REFERENCES.get(name) or STRUCTURES[name]
    found = structure_cost(structure, geometry((m, m, m, 1), n, bias=True), damped=damped)
    theory = leading_order(name, n, m, 3, damped)
    ratio = found.inversion_flops / theory
    if name == "unit-wise" and damped:
        # blocks of many units at once, with what is above their diagonals
        assert 0.9 < ratio < 3
    else:
        # passes over the parameters, which are 2 / N of a product with the inputs
        assert ratio == pytest.approx(1, abs=0.08 if name == "quasi-diagonal" else 0.03)


def test_units_that_are_off_on_some_samples_share_no_factorisation():
    def inversion(active, damped=False):
        sizes = geometry((40, 50, 1), n=10, active=active)
        return structure_cost(ng.UnitWise(), sizes, damped=damped).inversion_flops

    assert inversion(0.5) == inversion(None) == inversion(0.5, damped=True)
    assert inversion(0.5) > inversion(1.0) + 40 * 10**3 / 3


def test_gram_matrices_of_many_rows_are_halved_twice():
    n, m = 1024, 256
    found = structure_cost(ng.Exact(), geometry((m, m, m, 1), n))
    inputs, units = 2 * n**2 * 3 * m, 5 / 8 * 2 * n**2 * (2 * m + 1)
    assert found.inversion_flops == pytest.approx(inputs + units + cholesky(n), rel=0.03)


def test_the_smaller_space_is_counted():
    sizes = geometry((9, 9, 1), 10**4)
    params = 9 * 9 + 9
    auto = structure_cost(ng.Exact(), sizes, damped=True).inversion_flops
    assert auto < structure_cost(ng.Exact("sample"), sizes, damped=True).inversion_flops / 1000
    assert auto == pytest.approx(2 * params**2 * 10**4 + params**3 / 3, rel=0.03)


def test_biases_make_the_quasi_diagonal_dearer():
    n = 1000
    without, beside = geometry((30, 50, 1), n), geometry((30, 50, 1), n, bias=True)
    costs = [structure_cost(s, without).step_flops for s in (ng.Diagonal(), ng.QuasiDiagonal())]
    assert costs[0] == costs[1]
    costs = [structure_cost(s, beside).step_flops for s in (ng.Diagonal(), ng.QuasiDiagonal())]
    assert costs[1] - costs[0] == pytest.approx(2 * n * (30 * 50 + 50), rel=0.12)


def test_an_undamped_coupling_looks_at_the_rank_of_every_layer():
    """Sigma^{-1} 1 = (0, 1, 0): of three factorisations one is used, and made again."""
    n = 100
    grams = 2 * n**2 * (300 + 400 + 400 + 400 + 400 + 1)
    ranks = 3 * (n**3 / 3 + 4 * n**2)
    found = structure_cost(ng.BlockTriDiagonal(), geometry((300, 400, 400, 1)))
    assert found.inversion_flops == pytest.approx(grams + ranks + cholesky(n), rel=0.01)


def test_a_damped_tri_diagonal_metric_eliminates_every_other_layer():
    n = 100
    grams = 2 * n**2 * (300 + 400 + 400 + 400 + 400 + 1)
    inverses, product, rest = 2 * 10 * n**3 / 3, 2 * n**3, 2 * n**3 / 3
    found = structure_cost(ng.BlockTriDiagonal(), geometry((300, 400, 400, 1)), damped=True)
    assert found.inversion_flops == pytest.approx(grams + inverses + product + rest, rel=0.01)


def test_singular_coupling_costs_its_step_of_least_norm():
    # Sigma^+ 1 = (1, 1, 0, 1, 1) / 2, and layers 1, 2, 4 and 5 carry the null vector of Sigma
    n, width = 100, 200
    grams = 2 * n**2 * (2 * width) * 4 + 2 * n**2 * (width + 1)
    ranks, used = 5 * (n**3 / 3 + 4 * n**2), 4 * cholesky(n)
    # inverses from factors that are there already, and one system more
    least = 4 * (3 * n**3 + 4 * n**2) + cholesky(n)
    found = structure_cost(ng.BlockTriDiagonal(), geometry((*[width] * 5, 1), n))
    assert found.inversion_flops == pytest.approx(grams + ranks + used + least, rel=0.02)


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_cost_of_very_wide_networks(name, damped):
    """Over the flops of a gradient, 10 N M^2 here: an entry a parameter adds 2 N (2 M^2)."""
    limit = {"diagonal": 1.4, "quasi-diagonal": 1.8}.get(name, 1.0)
    errors = []
    for width in (10**3, 10**6):
        sizes = geometry((width, width, width, 1), n=50, bias=True)
        found = structure_cost(STRUCTURES[name], sizes, damped=damped)
        errors.append(abs(found.step_flops / gradient_flops(sizes) - limit))
    assert errors == sorted(errors, reverse=True)
    # divisions and other passes over the parameters stay beside the N samples
    assert errors[-1] < {"diagonal": 0.02, "quasi-diagonal": 0.1}.get(name, 1e-3)


@pytest.mark.parametrize("outputs", [1, 10])
def test_samples_times_outputs_set_the_cubic_part(outputs):
    small, large = (geometry((9, 9, outputs), n // outputs) for n in (10**4, 2 * 10**4))
    for structure in (
        ng.Exact("sample"),
        ng.BlockDiagonal("sample"),
        ng.BlockTriDiagonal("sample"),
    ):
        ratio = (
            structure_cost(structure, large, damped=True).inversion_flops
            / structure_cost(structure, small, damped=True).inversion_flops
        )
        np.testing.assert_allclose(ratio, 8, rtol=0.02)
    # a small network is inverted on its parameter side by K-FAC
    ratio = (
        structure_cost(ng.KFAC(), large, damped=True).inversion_flops
        / structure_cost(ng.KFAC(), small, damped=True).inversion_flops
    )
    np.testing.assert_allclose(ratio, 2, rtol=0.02)


def test_bad_arguments():
    sizes = geometry((30, 50, 1))
    with pytest.raises(TypeError, match="structure must be"):
        structure_cost("exact", sizes)
    with pytest.raises(ValueError, match="2 layers"):
        structure_cost(ng.LayerWise(np.eye(3)), sizes)
    with pytest.raises(ValueError, match="single layer"):
        structure_cost(ng.QuasiDiagonal(), geometry((30, 1)))

    class Unknown(na.GradientDescent.__base__):
        operator = damping_scale = lambda self, *arguments: jnp.zeros(())

    with pytest.raises(TypeError, match="Unknown is not known"):
        structure_cost(Unknown(), sizes)
