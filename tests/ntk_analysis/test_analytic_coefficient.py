"""Infinite-width coefficient matrices against the formulas of the paper, written out in NumPy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
import ntk_analysis.coefficient
from natgrad_flax.structures.layer_wise import SingularCouplingWarning
from ntk_analysis.reproduce.karakida_osawa.common import problem
from ntk_analysis.reproduce.karakida_osawa.kernels import reference_kernels, relu_expectations

INPUTS, N, N_TEST, DEPTH = 12, 6, 4, 3
SIGMA = np.array([[2.0, 0.3, -0.5], [0.3, 1.0, 0.2], [-0.5, 0.2, 1.5]])


def make_model(outputs=1, bias=0.2, inputs=INPUTS, depth=DEPTH):
    widths = (inputs, *[2] * (depth - 1), outputs)
    return ng.MLP(widths, bias_variance=bias, rngs=nnx.Rngs(0))


def make_inputs(count, seed, inputs=INPUTS):
    x = np.random.default_rng(seed).normal(size=(count, inputs))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


X, X_TEST = make_inputs(N, 0), make_inputs(N_TEST, 1)


def references(x=X, x_test=X_TEST, bias=0.2, depth=DEPTH):
    variances = [(2.0, bias)] * depth
    inside = reference_kernels(x, None, variances, relu_expectations)
    return inside, reference_kernels(x_test, x, variances, relu_expectations)


def analytic(structure, model=None, x=X, x_test=None, damping=0.0):
    return na.coefficient_matrix(
        structure, model or make_model(), x, x_test, damping=damping, kernels="analytic"
    )


def layer_wise(sigma, inside, outside, damping, n):
    """sum_l K_l(x', x) U_l with ((Sigma (x) I) blockdiag(K_l) + N rho) U = 1 (x) I."""
    depth = len(sigma)
    blocks = [
        [sigma[i, j] * inside[j] + n * damping * (i == j) * np.eye(n) for j in range(depth)]
        for i in range(depth)
    ]
    dual = np.linalg.solve(np.block(blocks), np.tile(np.eye(n), (depth, 1)))
    return sum(k @ u for k, u in zip(outside, dual.reshape(depth, n, n), strict=True))


def kfac(inside, outside, damping, n, last_divisor):
    """sum_l N (B' (B + ...)^-1) . (A' (A + ...)^-1): Eq. 21, with a damping for both factors."""
    total = 0
    for layer, (q, b, q_cross, b_cross) in enumerate(
        zip(inside.inputs, inside.derivatives, outside.inputs, outside.derivatives, strict=True)
    ):
        over = last_divisor if layer == len(inside.inputs) - 1 else n
        if layer == len(inside.inputs) - 1:
            # B of the last layer is 1 1^T: the pseudo-inverse for rank one
            units = over * b_cross @ np.linalg.pinv(b + over * damping * np.eye(n), rcond=1e-10)
        else:
            units = over * np.linalg.solve(b + over * damping * np.eye(n), b_cross.T).T
        samples = n * np.linalg.solve(q + n * damping * np.eye(n), q_cross.T).T
        total = total + units * samples / n
    return total


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("damping", [0.0, 0.03])
@pytest.mark.parametrize("at_test", [False, True])
def test_formulas_of_every_structure(outputs, damping, at_test):
    inside, outside = references()
    theta, cross = inside.tangent, (outside if at_test else inside).tangent
    shift = N * damping * np.eye(N)
    tri = np.eye(DEPTH) + np.eye(DEPTH, k=1) + np.eye(DEPTH, k=-1)
    expected = {
        ng.Exact(): sum(cross) @ np.linalg.inv(sum(theta) + shift),
        ng.BlockDiagonal(): sum(
            k @ np.linalg.inv(t + shift) for k, t in zip(cross, theta, strict=True)
        ),
        ng.BlockTriDiagonal(): layer_wise(tri, theta, cross, damping, N),
        ng.LayerWise(SIGMA): layer_wise(SIGMA, theta, cross, damping, N),
    }
    if not damping:
        expected[na.GradientDescent()] = sum(cross) / N
    model = make_model(outputs)
    for structure, matrix in expected.items():
        found = analytic(structure, model, x_test=X_TEST if at_test else None, damping=damping)
        assert found.dtype == np.float64
        np.testing.assert_allclose(
            found, np.kron(matrix, np.eye(outputs)), rtol=1e-8, atol=1e-9, err_msg=structure.name
        )


def test_layer_wise_theorem_at_infinite_width():
    # Eq. 16 in its own form: sum_l (Sigma^-1 1)_l Theta_l(x', x) Theta_l^-1
    inside, outside = references()
    for sigma in (SIGMA, SIGMA - 2 * np.eye(3)):
        weights = np.linalg.solve(sigma, np.ones(3))
        expected = sum(
            w * k @ np.linalg.inv(t)
            for w, k, t in zip(weights, outside.tangent, inside.tangent, strict=True)
        )
        found = analytic(ng.LayerWise(sigma), x_test=X_TEST)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(
    ("last", "divisor", "space"),
    # in sample space whatever is asked for: parameters are infinitely many
    [("scaled", N**2, "auto"), ("scaled", N**2, "parameter"), ("literal", N, "auto")],
)
@pytest.mark.parametrize("damping", [0.0, 0.02])
def test_kfac_is_eq_21(last, divisor, space, damping, outputs):
    inside, outside = references()
    model, structure = make_model(outputs), ng.KFAC(last_layer=last, space=space)
    for x_test, cross in ((None, inside), (X_TEST, outside)):
        found = analytic(structure, model, x_test=x_test, damping=damping)
        expected = kfac(inside, cross, damping, N, divisor)
        np.testing.assert_allclose(found, np.kron(expected, np.eye(outputs)), rtol=1e-8, atol=1e-8)


def test_kfac_with_fewer_inputs_than_samples():
    # layer 1 is X (X^T X)^+ X^T and not the identity; "scaled" multiplies it by N / M_0
    m0 = 4
    x, x_test = make_inputs(N, 2, m0), make_inputs(N_TEST, 3, m0)
    inside, outside = references(x, x_test, bias=0.0)
    for first, factor in (("literal", 1.0), ("scaled", N / m0)):
        structure = ng.KFAC(first_layer=first)
        for there, cross in ((None, inside), (x_test, outside)):
            rows = x if there is None else there
            projector = rows @ np.linalg.pinv(x.T @ x) @ x.T
            units = [
                b_cross @ np.linalg.inv(b)
                for b, b_cross in zip(inside.derivatives[:-1], cross.derivatives[:-1], strict=True)
            ]
            samples = [
                q_cross @ np.linalg.inv(q)
                for q, q_cross in zip(inside.inputs, cross.inputs, strict=True)
                if np.linalg.matrix_rank(q) == N
            ]
            assert len(samples) == DEPTH - 1
            # the last layer: B' B^+ = 11^T / N, times the extra N of "scaled"
            expected = N * (factor * units[0] * projector + units[1] * samples[0] + samples[1] / N)
            expected = expected + (1 - 1 / N) * N * samples[1]
            found = analytic(structure, make_model(bias=0.0, inputs=m0), x, there)
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("structure", "alpha"),
    [
        (ng.Exact(), 1),
        (ng.BlockDiagonal(), DEPTH),
        (ng.BlockTriDiagonal(), 1),
        (ng.LayerWise(SIGMA), np.linalg.solve(SIGMA, np.ones(3)).sum()),
        (ng.KFAC(), N * DEPTH),
        (ng.KFAC(last_layer="literal"), N * (DEPTH - 1) + 1),
    ],
)
@pytest.mark.parametrize("outputs", [1, 2])
def test_isotropy_at_zero_damping(structure, alpha, outputs):
    found = analytic(structure, make_model(outputs))
    np.testing.assert_allclose(found, alpha * np.eye(N * outputs), atol=1e-8 * alpha)


def test_tri_diagonal_with_a_singular_coupling():
    # L = 5 = 3s + 2: the pseudo-inverse gives alpha = s + 1 = 2
    with pytest.warns(SingularCouplingWarning):
        found = analytic(ng.BlockTriDiagonal(), make_model(depth=5))
    np.testing.assert_allclose(found, 2 * np.eye(N), atol=1e-7)


def test_relative_damping_is_a_number_in_disguise():
    theta = sum(references()[0].tangent)
    rho = 0.01 * np.trace(theta) / N**2
    relative = analytic(ng.Exact(), x_test=X_TEST, damping=ng.RelativeDamping(0.01))
    np.testing.assert_allclose(
        relative, analytic(ng.Exact(), x_test=X_TEST, damping=rho), rtol=1e-10
    )


def power_of(matrix, power, damping):
    """Of a positive semi-definite matrix with a damping, on its range without one."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-12 * values[-1] if not damping else values > -1
    return (vectors[:, kept] * (values[kept] + damping) ** power) @ vectors[:, kept].T


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("damping", [0.0, 0.03])
@pytest.mark.parametrize("power", [0.25, 1.0])
def test_shampoo_between_roots_of_kernels(power, damping, outputs):
    """a' r^T (r r^T / N + rho)^-p S^-1 of R, and of L, for inputs of other norms too."""
    x, x_test = X * np.linspace(0.5, 2, N)[:, None], X_TEST
    inside, outside = references(x, x_test)
    for there, cross in ((None, inside), (x_test, outside)):
        expected = 0
        for q, b, q_cross, b_cross in zip(
            inside.inputs, inside.derivatives, cross.inputs, cross.derivatives, strict=True
        ):
            part = 1 / N
            # all outputs count in R, where they are as many copies
            pairs = (q, q_cross, outputs * np.diag(b)), (b, b_cross, np.diag(q))
            for gram, between, weights in pairs:
                scale = np.sqrt(weights)
                inner = power_of(np.outer(scale, scale) * gram / N, -power, damping)
                part = part * ((between * scale) @ inner / scale)
            expected = expected + part
        found = analytic(ng.Shampoo(power), make_model(outputs), x, there, damping)
        np.testing.assert_allclose(found, np.kron(expected, np.eye(outputs)), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "structure",
    [ng.Exact(), ng.BlockDiagonal(), ng.BlockTriDiagonal(), ng.KFAC(), ng.Shampoo(0.5)],
)
def test_wide_networks_come_close(structure):
    width = 4096
    model = problem((INPUTS, width, width, 1), 1, activation="relu", bias_variance=0.2).model
    for damping in (0.0, 0.05):
        # with a damping K-FAC has no limit under width-dependent factors; ours are not
        expected = analytic(structure, x_test=X_TEST, damping=damping)
        found = na.coefficient_matrix(structure, model, X, X_TEST, damping=damping)
        scale = np.linalg.norm(expected)
        assert 0 < np.linalg.norm(found - expected) < 0.15 * scale


def test_unit_wise_has_a_limit_between_training_inputs_only():
    model = make_model(outputs=2)
    hidden = sum(model.widths[1:-1])
    expected = (1 + 0.5 * hidden / 2) * np.eye(2 * N)
    np.testing.assert_allclose(analytic(ng.UnitWise(), model), expected, rtol=1e-14)
    for options in (
        {"x_test": X_TEST},
        {"damping": 0.1},
        {"damping": ng.RelativeDamping(0.1)},
    ):
        with pytest.raises(ValueError, match="only between training inputs at zero damping"):
            analytic(ng.UnitWise(), model, **options)


@pytest.mark.parametrize("outputs", [1, 2])
def test_limits_that_are_alpha_times_the_identity(outputs):
    model = make_model(outputs)
    alphas = {
        ng.MiniBlock("inputs"): sum(model.widths[1:]) / outputs,
        ng.LowRankUnits(N): 1 + 0.5 * sum(model.widths[1:-1]) / outputs,
        ng.Nystroem(N * outputs, seed=0): 1.0,
    }
    for structure, alpha in alphas.items():
        expected = alpha * np.eye(outputs * N)
        np.testing.assert_allclose(analytic(structure, model), expected, rtol=1e-14)
        with pytest.raises(ValueError, match=f"zero damping.*; elsewhere {structure.why_no_limit}"):
            analytic(structure, model, x_test=X_TEST)


def test_mini_block_tends_to_its_limit():
    """Outputs of a sample are coupled at finite width alone."""
    apart = []
    for width in (64, 1024):
        widths = (INPUTS, width, width, 2)
        model = problem(widths, 2, activation="relu", bias_variance=0.2).model
        expected = analytic(ng.MiniBlock("inputs"), model)
        found = na.coefficient_matrix(ng.MiniBlock("inputs"), model, X)
        apart.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert 0 < apart[1] < apart[0] / 2 < 0.2


def test_ranks_below_that_of_the_fisher_have_no_limit():
    for structure, message in (
        (ng.LowRankUnits(N - 1), "keeps 5 eigenvalues a unit for 6 samples"),
        (ng.Nystroem(N - 1, seed=0), "sees 5 directions for N C = 6 outputs"),
    ):
        with pytest.raises(
            ValueError, match=f"only where it is isotropic. the structure {message}"
        ):
            analytic(structure)


def test_structures_without_a_limit_are_refused():
    for structure in (ng.Diagonal(), ng.QuasiDiagonal(), ng.UnitBlocks(4)):
        with pytest.raises(ValueError, match=f"{structure.name} has no infinite-width kernel"):
            analytic(structure)
    with pytest.raises(ValueError, match="isotropic in no last layer"):
        analytic(ng.MiniBlock("units"))
    with pytest.raises(ValueError, match="relative damping of Shampoo has no infinite-width limit"):
        analytic(ng.Shampoo(0.5), damping=ng.RelativeDamping(0.1))
    image, model = (
        np.ones((N, 4, 4, 1)),
        ng.ConvNet((4, 4, 1), (2,), 1, strides=1, rngs=nnx.Rngs(0)),
    )
    for structure in (ng.MiniBlock("inputs"), ng.Shampoo(0.5), ng.LowRankUnits(N)):
        with pytest.raises(ValueError, match=f"{structure.name} has no .* kernel of a ConvNet"):
            analytic(structure, model, image)
    with pytest.raises(ValueError, match=r'KFAC\(split="pi"\).*use split="plain"'):
        analytic(ng.KFAC(split="pi"), damping=0.1)


def test_bad_input():
    class Other(nnx.Module):
        pass

    for structure in (ng.Exact(), ng.UnitWise()):
        with pytest.raises(TypeError, match="Other has no infinite-width limit"):
            analytic(structure, Other())
    with pytest.raises(ValueError, match=r"x_train must have shape \(N, 12\)"):
        analytic(ng.Exact(), x=X[:, :3])
    with pytest.raises(ValueError, match=r"x_test must have shape \(N, 12\)"):
        analytic(ng.Exact(), x_test=X_TEST[:, :3])
    with pytest.raises(TypeError, match="x_train must be a floating array"):
        analytic(ng.KFAC(), x=np.ones((N, INPUTS), int))
    with pytest.raises(ValueError, match="takes no damping"):
        analytic(na.GradientDescent(), damping=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analytic(ng.Exact())


def test_predicted_training_computes_each_kernel_once(monkeypatch):
    """Eq. 5 with both matrices, from the kernels of the training inputs and the crossing ones."""
    compute, computed = ntk_analysis.coefficient.analytic_kernels, []

    def counted(model, first, second=None, **options):
        computed.append("train" if second is None else "cross")
        return compute(model, first, second, **options)

    monkeypatch.setattr(ntk_analysis.coefficient, "analytic_kernels", counted)
    model, structure = make_model(), ng.BlockDiagonal()
    y = np.linspace(-1, 1, N)[:, None]
    found = na.predict_dynamics(structure, model, X, y, 0.2, 2, 0.1, X_TEST, "analytic")
    assert computed == ["train", "cross"]
    residual = (found.outputs_train[1] - y).reshape(-1)
    for outputs, x_test in ((found.outputs_train, None), (found.outputs_test, X_TEST)):
        matrix = analytic(structure, model, x_test=x_test, damping=0.1)
        step = (outputs[2] - outputs[1]).reshape(-1)
        np.testing.assert_allclose(step, -0.2 * matrix @ residual, rtol=1e-10, atol=1e-12)
