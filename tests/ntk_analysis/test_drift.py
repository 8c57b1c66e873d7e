"""Drift of tangent kernels against dense Jacobians, and what theory says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3))
Y = RNG.normal(size=(5, 2))


def network(seed: int, widths=(3, 4, 2)) -> ng.MLP:
    return ng.MLP(widths, activation="tanh", bias_variance=0.1, rngs=nnx.Rngs(seed))


def dense_jacobian(model: nnx.Module) -> np.ndarray:
    """By jax.jacobian, shape (N, C, P)."""
    with jax.enable_x64(True):
        graphdef, state = nnx.split(model)
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
        found = jax.jit(jax.jacobian(lambda state: nnx.merge(graphdef, state)(X)))(state)
        leaves = [np.asarray(leaf).reshape(5, 2, -1) for leaf in jax.tree.leaves(found)]
    return np.concatenate(leaves, axis=2)


def test_against_dense_jacobians() -> None:
    """The mean over samples is taken off the features themselves, not off the kernel."""
    models = network(0), network(1)
    found = na.kernel_drift(*models, X, Y)
    jacobians = [dense_jacobian(model) for model in models]
    whole = [j.reshape(10, -1) @ j.reshape(10, -1).T for j in jacobians]
    norm = np.linalg.norm
    assert found.relative_change == pytest.approx(norm(whole[1] - whole[0]) / norm(whole[0]))
    first, second = (j - j.mean(axis=0) for j in jacobians)
    first, second = (j.reshape(10, -1) for j in (first, second))
    shared = norm(first.T @ second) ** 2
    assert found.cka == pytest.approx(shared / (norm(first.T @ first) * norm(second.T @ second)))
    targets = (Y - Y.mean(axis=0)).reshape(-1)
    for features, alignment in ((first, found.alignment_0), (second, found.alignment_t)):
        kernel = features @ features.T
        outer = np.outer(targets, targets)
        assert alignment == pytest.approx(np.sum(kernel * outer) / (norm(kernel) * norm(outer)))
    layers = [na.empirical_layer_kernels(model, X) for model in models]
    changes = [norm(b - a) / norm(a) for a, b in zip(*layers, strict=True)]
    np.testing.assert_allclose(found.layer_changes, changes, rtol=1e-10)


def test_a_kernel_that_stays_or_is_scaled() -> None:
    """Twice the last weights are four times the kernel of all layers before."""
    model = ng.MLP((3, 4, 1), rngs=nnx.Rngs(0))
    scaled = nnx.clone(model)
    scaled.layers[1].kernel[...] = 2 * scaled.layers[1].kernel[...]
    found = na.kernel_drift(model, scaled, X)
    np.testing.assert_allclose(found.layer_changes, [3, 0], atol=1e-12)
    assert (found.alignment_0, found.alignment_t) == (None, None)
    same = na.kernel_drift(model, model, X, X[:, :1])
    assert same.relative_change == 0
    assert same.cka == pytest.approx(1)
    assert same.alignment_0 == same.alignment_t


def test_one_step_moves_the_kernel_less_the_wider_the_network() -> None:
    """By 1 / M in NTK parametrisation (Dyer & Gur-Ari 2020); targets so large that f_0 is not."""
    changes, x, y = [], jnp.float32(X), jnp.float32(10 * Y)
    for width in (64, 1024):
        model = network(0, (3, width, 2))
        moved = nnx.clone(model)

        def loss(model):
            return jnp.sum((model(x) - y) ** 2)

        gradient = nnx.grad(loss)(moved)
        nnx.update(moved, jax.tree.map(lambda p, g: p - 0.01 * g, nnx.state(model), gradient))
        changes.append(na.kernel_drift(model, moved, X).relative_change)
    assert changes[0] / changes[1] == pytest.approx(16, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((network(0), network(0, (3, 4, 4, 2)), X), "one has 2 layers and 2 outputs, the other 3"),
        ((network(0), network(1), X[:1]), "at least two samples that do"),
        ((network(0), network(1), X[[0, 0, 0]]), "the same for all samples of x"),
        ((network(0), network(1), X, np.ones((5, 2))), "y must differ between samples"),
    ],
    ids=range(4),
)
def test_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        na.kernel_drift(*arguments)
