"""Parameter displacements, against a linearised network trained step by step in parameter space."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis.displacement import parameter_displacement

INPUTS, N, OUTPUTS, STEPS = 8, 5, 2, 6
rng = np.random.default_rng(0)
X = rng.normal(size=(N, INPUTS)) / np.sqrt(INPUTS)
Y = rng.normal(size=(N, OUTPUTS))
COUPLED = ng.LayerWise([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]])


def make_model() -> ng.MLP:
    return ng.MLP((INPUTS, 12, 12, OUTPUTS), activation="tanh", bias_variance=0.2, rngs=nnx.Rngs(2))


def ravel(state) -> np.ndarray:
    """Layer after layer, the kernel row by row and then the bias, as signals have it."""
    layers = [state["layers"][index] for index in range(3)]
    return np.concatenate([np.ravel(a[key][...]) for a in layers for key in ("kernel", "bias")])


class Linearised:
    """f_0 + J (theta - theta_0) by automatic differentiation."""

    def __init__(self) -> None:
        graphdef, state = nnx.split(make_model())
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)

        def outputs(params):
            return nnx.merge(graphdef, params)(jnp.asarray(X)).reshape(-1)

        self.signals = ng.jacobian_signals(nnx.merge(graphdef, state), jnp.asarray(X))
        jacobian = jax.jacobian(outputs)(state)
        # one row of parameters after another, in the order of ``ravel``
        rows = [jax.tree.map(lambda leaf, i=i: leaf[i], jacobian) for i in range(N * OUTPUTS)]
        self.jacobian = np.stack([ravel(row) for row in rows])
        self.residual = np.asarray(outputs(state)) - Y.reshape(-1)

    def train(self, structure, rate, steps, damping):
        """Steps with the dense metric."""
        rho = damping
        if isinstance(damping, ng.RelativeDamping):
            rho = damping.ratio * structure.damping_scale(self.signals)
        dense = np.asarray(structure.to_dense(self.signals, rho))
        undamped = not isinstance(damping, ng.RelativeDamping) and damping == 0
        inverse = np.linalg.pinv(dense, rcond=1e-11) if undamped else np.linalg.inv(dense)
        moved = np.zeros(len(inverse))
        for _ in range(steps):
            residual = self.residual + self.jacobian @ moved
            moved = moved - rate * (inverse @ (self.jacobian.T @ residual)) / N
        return moved


@pytest.fixture(scope="module")
def linearised():
    with jax.enable_x64(True):
        return Linearised()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("structure", "rate", "damping"),
    [
        (na.GradientDescent(), 0.3, 0.0),
        (ng.Exact(), 0.7, 0.0),
        (ng.Exact(), 0.7, 1e-3),
        (ng.BlockDiagonal(), 0.2, 0.0),
        (ng.BlockDiagonal(), 0.2, ng.RelativeDamping(1e-2)),
        (ng.BlockTriDiagonal(), 0.5, 0.0),
        (COUPLED, 0.4, 0.0),
        (COUPLED, 0.4, 1e-2),
        (ng.KFAC(), 0.02, 1e-2),
        (ng.UnitWise(), 0.02, 1e-3),
        (ng.Diagonal(), 1e-3, 1e-2),
        (ng.QuasiDiagonal(), 1e-3, 1e-2),
    ],
    ids=lambda value: value.name if isinstance(value, ng.Structure) else None,
)
def test_against_training_in_parameter_space(linearised, structure, rate, damping):
    with jax.enable_x64(True):
        wanted = linearised.train(structure, rate, STEPS, damping)
    found = parameter_displacement(structure, make_model(), X, Y, rate, STEPS, damping)
    assert distance(ravel(found), wanted) < 1e-8


@pytest.mark.parametrize("structure", [ng.Exact(), ng.BlockDiagonal(), ng.BlockTriDiagonal()])
def test_closed_form_of_isotropic_structures(linearised, structure):
    model, alpha = make_model(), {"Exact": 1, "BlockDiagonal": 3, "BlockTriDiagonal": 1}
    a, rate = alpha[structure.name], 0.3
    with jax.enable_x64(True):
        dense = np.asarray(structure.to_dense(linearised.signals))
    direction = (
        -np.linalg.pinv(dense, rcond=1e-11) @ linearised.jacobian.T @ linearised.residual / N
    )
    for steps in (1, 4):
        wanted = (1 - (1 - a * rate) ** steps) / a * direction
        found = parameter_displacement(structure, model, X, Y, rate, steps)
        assert distance(ravel(found), wanted) < 1e-8
    limit = parameter_displacement(structure, model, X, Y, rate, math.inf)
    assert distance(ravel(limit), direction / a) < 1e-8


def test_block_diagonal_layers_by_their_own_kernels(linearised):
    # Eq. 22 for layer-wise structures: block l is (Sigma^{-1} 1)_l J_l^T K_l^{-1} (y - f_0)
    found = ravel(parameter_displacement(COUPLED, make_model(), X, Y, 0.4, math.inf))
    weights = np.linalg.solve(np.asarray(COUPLED.sigma), np.ones(3))
    sizes = [layer.num_params for layer in linearised.signals.layers]
    parts = np.split(linearised.jacobian, np.cumsum(sizes)[:-1], axis=1)
    blocks = [
        w * j.T @ np.linalg.solve(j @ j.T, linearised.residual)
        for w, j in zip(weights, parts, strict=True)
    ]
    assert distance(found, -np.concatenate(blocks) / weights.sum()) < 1e-8


def test_limits_share_the_outputs_and_not_the_parameters(linearised):
    model = make_model()
    limits = {
        structure.name: ravel(
            parameter_displacement(structure, model, X, Y, rate, math.inf, damping)
        )
        for structure, rate, damping in (
            (ng.Exact(), 1.0, 0.0),
            (ng.BlockDiagonal(), 0.3, 0.0),
            (ng.BlockTriDiagonal(), 1.0, 0.0),
            (ng.KFAC(), 0.02, 1e-2),
            (ng.UnitWise(), 0.02, 1e-3),
        )
    }
    for moved in limits.values():
        np.testing.assert_allclose(linearised.jacobian @ moved, -linearised.residual, atol=1e-8)
    for a, b in itertools.combinations(limits.values(), 2):
        assert distance(a, b) > 0.1
    # Eq. 14: gradient descent ends where the exact natural gradient does
    rate = 1 / np.linalg.eigvalsh(na.coefficient_matrix(na.GradientDescent(), model, X))[-1]
    slow = parameter_displacement(na.GradientDescent(), model, X, Y, rate, math.inf)
    assert distance(ravel(slow), limits["Exact"]) < 1e-6
    many = parameter_displacement(na.GradientDescent(), model, X, Y, rate, 20_000)
    assert distance(ravel(many), limits["Exact"]) < 1e-6
    few = parameter_displacement(na.GradientDescent(), model, X, Y, rate, 3)
    assert distance(ravel(few), limits["Exact"]) > 0.1


def test_the_state_adds_to_that_of_the_model():
    model = make_model()
    params = nnx.state(model, nnx.Param)
    moved = parameter_displacement(ng.Exact(), model, X, Y, 1.0, 1)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for leaf, old in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == np.float64
        assert leaf.shape == old.shape
    before = np.abs(np.asarray(model(X.astype(np.float32))) - Y).max()
    nnx.update(model, jax.tree.map(lambda a, b: a + jnp.asarray(b, a.dtype), params, moved))
    assert np.abs(np.asarray(model(X.astype(np.float32))) - Y).max() < before
    still = parameter_displacement(ng.Exact(), make_model(), X, Y, 1.0, 0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(still))


def test_bad_arguments():
    model = make_model()
    for steps in (-1, 1.5, True, "all", -math.inf, math.nan):
        with pytest.raises(ValueError, match="steps must be"):
            parameter_displacement(ng.Exact(), model, X, Y, 1.0, steps)
    with pytest.raises(ValueError, match="learning_rate"):
        parameter_displacement(ng.Exact(), model, X, Y, -1.0, 1)
    with pytest.raises(ValueError, match="y must have shape"):
        parameter_displacement(ng.Exact(), model, X, Y[:, :1], 1.0, 1)
    with pytest.raises(TypeError, match="structure"):
        parameter_displacement("exact", model, X, Y, 1.0, 1)
    with pytest.raises(ValueError, match=r"spectral radius of I - eta Theta-bar is 1\.1,"):
        parameter_displacement(ng.Exact(), model, X, Y, 2.1, math.inf)
