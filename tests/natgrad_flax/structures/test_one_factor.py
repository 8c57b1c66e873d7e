"""Half of K-FAC: what of isotropy one factor keeps, by theory."""

import jax
import numpy as np
import pytest
from flax import nnx
from natgrad_reference import make_mlp

import natgrad_flax as ng
import ntk_analysis as na

pytestmark = pytest.mark.usefixtures("x64")

X = np.random.default_rng(0).normal(size=(5, 8))
INPUTS, UNITS = ng.Foof("inputs"), ng.Foof("units")


def answers(widths):
    """Theta-bar of both sides, their diagonals where they have some, and the signals."""
    graphdef, state = nnx.split(make_mlp(widths, 1, activation="tanh", bias_variance=0.2))

    @jax.jit
    def run(state):
        signals = ng.jacobian_signals(nnx.merge(graphdef, state), X)
        return [s.coefficient(signals, signals, 0.0) for s in (INPUTS, UNITS)], signals

    both, signals = run(state)
    return both, [s.undamped_diagonal(signals) for s in (INPUTS, UNITS)], signals


def test_inputs_of_full_rank_leave_the_norms_of_derivatives():
    (matrix, _), (diagonal, _), signals = answers((8, 9, 7, 1))
    norms = sum(
        np.sum(np.asarray(layer.derivatives)[:, 0] ** 2, axis=1) for layer in signals.layers
    )
    np.testing.assert_allclose(matrix, np.diag(norms), atol=1e-12)
    np.testing.assert_allclose(diagonal, norms, rtol=1e-13)


def test_the_mirror_has_norms_of_inputs_but_in_the_last_layer():
    (matrix, mirror), (diagonal, other), signals = answers((8, 12, 13, 2))
    inputs = [np.asarray(layer.augmented_inputs()) for layer in signals.layers]
    norms = sum(np.sum(a**2, axis=1) for a in inputs[:2])
    # B* of the last layer is the identity: what is left of it is the Gram matrix of its inputs
    last = np.kron(inputs[2] @ inputs[2].T, np.eye(2)) / 5
    np.testing.assert_allclose(mirror, np.diag(np.repeat(norms, 2)) + last, atol=1e-12)
    assert other is None
    # two outputs of a sample stay coupled, those of two samples do not
    assert diagonal is None
    coupled = np.asarray(matrix).reshape(5, 2, 5, 2)
    apart = coupled * (1 - np.eye(5))[:, None, :, None]
    np.testing.assert_allclose(apart, 0, atol=1e-12)
    assert np.abs(coupled[0, 0, 0, 1]) > 1e-3


def test_its_limit_is_the_diagonal_of_the_kernels_of_derivatives():
    model = ng.MLP((8, 64, 64, 1), rngs=nnx.Rngs(0))
    limit = na.coefficient_matrix(INPUTS, model, X, kernels="analytic")
    kernels = na.analytic_kernels(model, X)
    wanted = sum(np.diag(np.diag(part)) for part in kernels.derivatives)
    np.testing.assert_allclose(limit, wanted, atol=1e-10)


@pytest.mark.parametrize("options", [{"side": "both"}, {"side": "units", "sharing": "sum"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match="must be one of"):
        ng.Foof(**options)
