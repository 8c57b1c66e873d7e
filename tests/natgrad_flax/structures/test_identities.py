"""The claims of Karakida & Osawa 2020 about structures, by the identifiers of the science notes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import pytest
from flax import nnx
from natgrad_reference import make_mlp, metric, reference
from random_signals import dense

import natgrad_flax as ng
from natgrad_flax.structures import Geometry

MSE = ng.MeanSquaredError()

pytestmark = pytest.mark.usefixtures("x64")


def problem(widths, n, *, seed=0, **settings):
    rng = np.random.default_rng(seed)
    model = make_mlp(widths, seed, **settings)
    x = rng.normal(size=(n, widths[0]))
    x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))
    return model, x, jnp.asarray(rng.normal(size=(n, widths[-1])))


@partial(jax.jit, static_argnums=0)
def compiled_signals(graphdef, state, x):
    return ng.jacobian_signals(nnx.merge(graphdef, state), x)


def signals_of(model, x):
    """Signals from one program: to compile them operation by operation takes longer."""
    return compiled_signals(*nnx.split(model), x)


def compiled_coefficient(structure, there, here, damping):
    return np.asarray(jax.jit(lambda a, b: structure.coefficient(a, b, damping))(there, here))


def coefficient(structure, model, x, damping=0.0):
    signals = signals_of(model, x)
    return compiled_coefficient(structure, signals, signals, damping)


def function_step(structure, model, x, y, loss):
    """J G^{-1} of the gradient, undamped: the opposite of how the outputs move."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state):
        model = nnx.merge(graphdef, state)
        signals, residual = ng.fisher_signals(model, x, y, loss=loss)
        update = structure.solve(signals, residual, 0.0)
        plain = ng.jacobian_signals(model, x)
        return sum(a.jvp(b) for a, b in zip(plain.layers, update, strict=True))

    return np.asarray(step(state))


def dense_coefficient(structure, model, x, damping=0.0):
    n = x.shape[0]
    ref = reference(model, x, np.zeros((n, model.widths[-1])), MSE)
    matrix = metric(structure, ref, damping)
    return ref.jacobian @ np.linalg.pinv(matrix, rtol=1e-11) @ ref.jacobian.T / n


def random_sigma(depth, definite, seed=0):
    sigma = np.random.default_rng(seed).normal(size=(depth, depth))
    return sigma @ sigma.T + 0.5 * np.eye(depth) if definite else sigma + sigma.T


@pytest.mark.parametrize("definite", [True, False])
def test_theorem_4_1_holds_for_any_nonsingular_sigma(definite):
    """KO-Thm4.1: Theta-bar = (1^T Sigma^{-1} 1) I, definite Sigma or not."""
    model, x, _ = problem((6, 10, 10, 10, 2), 4, activation="tanh", bias_variance=0.1)
    sigma = random_sigma(4, definite)
    structure = ng.LayerWise(sigma)
    alpha = np.ones(4) @ np.linalg.solve(sigma, np.ones(4))
    for matrix in (coefficient(structure, model, x), dense_coefficient(structure, model, x)):
        np.testing.assert_allclose(matrix, alpha * np.eye(8), atol=1e-10 * max(1, abs(alpha)))
    assert ng.optimal_learning_rate(structure, model, 4) == pytest.approx(1 / alpha)


@pytest.mark.parametrize("c", [0.25, 0.5, 1.0, 1.5, 1.9, 2.1])
@pytest.mark.parametrize("structure", [ng.Exact(), ng.BlockDiagonal(), ng.BlockTriDiagonal()])
def test_corollary_4_2_rates_of_the_linearised_network(structure, c):
    """KO-Cor4.2: |f_t - y| = |1 - c|^t |f_0 - y| at eta = c / alpha; c > 2 diverges."""
    model, x, y = problem((8, 12, 12, 1), 5, activation="tanh")
    signals = signals_of(model, x)
    rate = c * ng.optimal_learning_rate(structure, model, 5)
    residual = start = signals.outputs - y
    for step in range(1, 4):
        update = structure.solve(signals, ng.Residual(residual, None), 0.0)
        moves = [a.jvp(b) for a, b in zip(signals.layers, update, strict=True)]
        residual = residual - rate * sum(moves)
        scale = abs(1 - c) ** step
        np.testing.assert_allclose(residual, (1 - c) ** step * start, atol=1e-10 * max(1, scale))
    assert (jnp.linalg.norm(residual) > jnp.linalg.norm(start)) == (c > 2)


@pytest.mark.parametrize("depth", range(1, 10))
def test_lemma_4_3_alpha_of_the_tri_diagonal_structure(depth):
    """KO-Lem4.3: alpha, the 0/1 weights, and that Sigma is indefinite, not positive definite."""
    structure = ng.BlockTriDiagonal()
    sigma = structure.coupling(depth)
    angles = np.arange(1, depth + 1) * np.pi / (depth + 1)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(sigma), np.sort(1 + 2 * np.cos(angles)), atol=1e-12
    )
    assert (np.linalg.eigvalsh(sigma)[0] < -0.4) == (depth >= 3)
    alpha = structure.alpha(Geometry(((9, 9),) * depth, 4, 1))
    assert alpha == pytest.approx(depth // 3 if depth % 3 == 0 else depth // 3 + 1)
    trained = {3: [1], 4: [0, 3], 6: [1, 4], 7: [0, 3, 6]}
    if depth in trained:
        expected = np.isin(np.arange(depth), trained[depth]).astype(float)
        np.testing.assert_allclose(structure.weights(depth), expected, atol=1e-12)


def test_lemma_4_3_singular_depth_is_isotropic_by_the_pseudo_inverse():
    """KO-Lem4.3, L = 5: J G^+ J^T / N = 2 I, and the update is the least-norm one and the limit."""
    model, x, y = problem((6, 9, 10, 9, 11, 1), 4, activation="tanh")
    structure = ng.BlockTriDiagonal("sample")
    np.testing.assert_allclose(coefficient(structure, model, x), 2 * np.eye(4), atol=1e-8)
    np.testing.assert_allclose(dense_coefficient(structure, model, x), 2 * np.eye(4), atol=1e-8)

    def solve(damping):
        with pytest.warns(ng.SingularCouplingWarning, match=r"3s \+ 2.*alpha = 2"):
            update = ng.natural_gradient(
                model, x, y, structure=structure, loss=MSE, damping=damping
            )
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(update)])

    exact, near = solve(0.0), solve(1e-11)
    np.testing.assert_allclose(near, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(("outputs", "bias"), [(1, 0.0), (2, 0.3)])
def test_kfac_alphas_of_both_last_layers(outputs, bias):
    """KO-Eq20/21: N (L - 1) + 1 literally, N L scaled; also with biases and several outputs."""
    n = 4
    model, x, _ = problem((6, 12, 13, outputs), n, activation="tanh", bias_variance=bias)
    for last, alpha in (("literal", 2 * n + 1), ("scaled", 3 * n)):
        structure = ng.KFAC(last_layer=last)
        found = coefficient(structure, model, x)
        np.testing.assert_allclose(found, alpha * np.eye(n * outputs), atol=1e-8 * alpha)
        assert 1 / ng.optimal_learning_rate(structure, model, n) == pytest.approx(alpha)


def test_kfac_needs_wide_layers():
    """The ReLU counterexample: 10 outputs through 8 units is not isotropic, and is refused."""
    model, x, _ = problem((6, 8, 8, 2), 5, activation="relu")
    found = coefficient(ng.KFAC(), model, x)
    assert np.abs(found - 15 * np.eye(10)).max() > 1
    with pytest.raises(ValueError, match=r"layer 1 has 8 units for N C = 10"):
        ng.optimal_learning_rate(ng.KFAC(), model, 5)


def test_kfac_with_fewer_inputs_than_samples():
    """KO-KFAC-lowdim: layer 1 gives N diag(X (X^T X)^{-1} X^T)."""
    n = 9
    model, x, _ = problem((4, 14, 15, 1), n, activation="tanh")
    hat = np.asarray(x @ jnp.linalg.inv(x.T @ x) @ x.T)
    expected = n * (2 * np.eye(n) + np.diag(np.diag(hat)))
    np.testing.assert_allclose(coefficient(ng.KFAC(), model, x), expected, atol=1e-8 * n)


def test_kfac_after_a_forster_transform():
    """KO-Forster: alpha = N (L - 1) + M_0, and N L when layer 1 is scaled by N / M_0."""
    n, m = 20, 6
    x = np.random.default_rng(0).normal(size=(n, m))
    z = natgrad_datasets.forster_transform(x).x_train
    np.testing.assert_allclose(z.T @ z, n / m * np.eye(m), atol=1e-8)
    model = make_mlp((m, 24, 25, 1), 0, activation="tanh")
    for first, alpha in (("literal", 2 * n + m), ("scaled", 3 * n)):
        structure = ng.KFAC(first_layer=first)
        found = coefficient(structure, model, jnp.asarray(z))
        np.testing.assert_allclose(found, alpha * np.eye(n), atol=1e-6)
        with pytest.warns(ng.IsotropyWarning, match="layer 1 has 6 inputs for 20 samples.*Forster"):
            rate = ng.optimal_learning_rate(structure, model, n)
        assert 1 / rate == pytest.approx(alpha)


def test_eq_22_parameters_and_different_minima():
    """KO-Eq22: block l of G^{-1} J^T / N is (Sigma^{-1} 1)_l J_l^T K_l^{-1}; many minima."""
    model, x, y = problem((8, 12, 13, 1), 5, activation="tanh")
    ref = reference(model, x, y, MSE)
    r = np.asarray(model(x) - y).reshape(-1)
    solutions = []
    for structure in (
        ng.Exact(),
        ng.BlockDiagonal(),
        ng.BlockTriDiagonal(),
        ng.LayerWise(random_sigma(3, True)),
        ng.KFAC(),
    ):
        alpha = 1 / ng.optimal_learning_rate(structure, model, 5)
        update = ng.natural_gradient(model, x, y, structure=structure, loss=MSE)
        flat = np.concatenate(
            [np.ravel(update["layers"][i]["kernel"][...]) for i in range(len(model.layers))]
        )
        if isinstance(structure, ng.LayerWise):
            for index, weight in enumerate(structure.weights(3)):
                jac = ref.jacobian[:, ref.owner == index]
                expected = weight * jac.T @ np.linalg.solve(jac @ jac.T, r)
                np.testing.assert_allclose(flat[ref.owner == index], expected, atol=1e-8)
        np.testing.assert_allclose(ref.jacobian @ flat / alpha, r, atol=1e-8)
        solutions.append(flat / alpha)
    for i, a in enumerate(solutions):
        for b in solutions[:i]:
            assert np.linalg.norm(a - b) > 0.1 * np.linalg.norm(a)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_theorem_5_1_unit_wise_is_diagonal_with_active_counts(activation):
    """KO-Thm5.1: Theta-bar[n, n] = 1 + number of units with a non-zero derivative."""
    model, x, _ = problem((8, 20, 21, 1), 5, activation=activation)
    signals = signals_of(model, x)
    counts = 1 + sum(
        np.count_nonzero(np.asarray(layer.derivatives[:, 0]), axis=1)
        for layer in signals.layers[:-1]
    )
    found = coefficient(ng.UnitWise(), model, x)
    np.testing.assert_allclose(found, np.diag(counts.astype(float)), atol=1e-8 * counts.max())
    alpha = 1 / ng.optimal_learning_rate(ng.UnitWise(), model, 5)
    assert alpha == pytest.approx(42 if activation == "tanh" else 21.5)
    if activation == "tanh":
        assert (counts == 42).all()


def test_theorem_5_1_holds_however_small_derivatives_are():
    """An active sample counts, though its squared derivative is 1e-14 of another one's."""
    rng = np.random.default_rng(0)
    layer = dense(rng, 5, 1, 8, 20)
    active = rng.random((5, 1, 20)) > 0.3
    scale = jnp.asarray(np.where(active, 10.0 ** rng.uniform(-7, 0, active.shape), 0))
    layer = replace(layer, derivatives=scale * layer.derivatives)
    signals = ng.Signals((layer,), jnp.zeros((5, 1)))
    found = compiled_coefficient(ng.UnitWise(), signals, signals, 0.0)
    np.testing.assert_allclose(found, np.diag(active.sum((1, 2))), atol=1e-6)


def test_section_d_exact_plus_mse():
    """KO-SecD: the function step is (H + rho I)^{-1} (p - y); alpha times it layer-wise."""
    rho = 0.05
    loss = ng.SoftmaxCrossEntropy(output_damping=rho)
    model, x, _ = problem((7, 14, 15, 3), 4, activation="tanh", bias_variance=0.1)
    y = jnp.eye(3)[jnp.asarray([0, 2, 1, 0])]
    p = np.asarray(jax.nn.softmax(model(x)))
    h = np.asarray(ng.SoftmaxCrossEntropy().fisher(model(x))) + rho * np.eye(3)
    expected = np.stack([np.linalg.solve(a, b) for a, b in zip(h, p - np.asarray(y), strict=True)])
    for structure in (ng.Exact(), ng.BlockDiagonal(), ng.LayerWise(random_sigma(3, False))):
        alpha = 1 / ng.optimal_learning_rate(structure, model, 4)
        step = function_step(structure, model, x, y, loss)
        np.testing.assert_allclose(
            step, alpha * expected, atol=1e-8 * np.abs(alpha * expected).max()
        )


def test_undamped_cross_entropy_moves_the_true_class_only():
    """Science 3.6: the logits move by 1 / p_k for the label k, up to a shift of each sample."""
    model, x, _ = problem((7, 14, 15, 3), 4, activation="tanh")
    labels = np.asarray([0, 2, 1, 0])
    y = jnp.eye(3)[labels]
    step = -function_step(ng.Exact(), model, x, y, ng.SoftmaxCrossEntropy())
    p = np.asarray(jax.nn.softmax(model(x)))
    expected = np.eye(3)[labels] / p[np.arange(4), labels][:, None]
    shifted = step - expected
    np.testing.assert_allclose(shifted - shifted[:, :1], 0, atol=1e-9)


def test_unit_wise_fraction_of_the_exact_fisher():
    """KO-NZ: non-zeros of the unit-wise over the exact Fisher are 1 / (M (L - 1))."""
    width, n = 40, 6
    model, x, _ = problem((width, width, width, 1), n, activation="tanh")
    signals = signals_of(model, x)
    exact = np.count_nonzero(np.asarray(ng.Exact().to_dense(signals)))
    unit = np.count_nonzero(np.asarray(ng.UnitWise().to_dense(signals)))
    assert unit / exact == pytest.approx(1 / (2 * width), rel=0.1)


def test_same_seed_same_bits():
    """Two runs from the same seed agree to the last bit."""
    x = jax.random.normal(jax.random.key(1), (6, 9), jnp.float32)
    y = jax.random.normal(jax.random.key(2), (6, 2), jnp.float32)

    def run():
        model = ng.MLP((9, 16, 16, 2), rngs=nnx.Rngs(3))
        update = ng.natural_gradient(
            model,
            x,
            y,
            structure=ng.UnitWise(),
            loss=MSE,
            damping=0.1,
            fisher="mc",
            key=jax.random.key(4),
        )
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(update)]

    assert run() == run()
