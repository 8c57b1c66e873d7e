"""Relative damping where the Fisher vanishes: fitted batches, dead layers, zero residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import made
from natgrad_reference import flatten, make_mlp

import natgrad_flax as ng

RATIO = 1e-3
EPS = np.finfo(np.float32).eps
LABELS = np.asarray([0, 1, 2, 0, 1, 2, 0])
Y = jnp.asarray(np.eye(3)[LABELS], jnp.float32)
STRUCTURES = made(3)
structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


def fitted(margin):
    """A network of three layers whose right class leads by a margin on every sample."""
    model = make_mlp((6, 9, 9, 3), 0, np.float32, activation="relu")
    x = np.concatenate([np.eye(3)[LABELS], np.random.default_rng(1).normal(size=(7, 3))], axis=1)
    outer = np.zeros((9, 3))
    outer[:3] = margin / 9 * np.eye(3)
    inner = np.zeros((9, 9))
    inner[:3, :3], inner[3:, 3:] = 3 * np.eye(3), np.eye(6)
    first = np.random.default_rng(2).normal(size=(6, 9))
    first[:, :3] = 0
    first[:3, :3] = 3 * np.sqrt(6) * np.eye(3)
    for layer, kernel in zip(model.layers, (first, inner, outer), strict=True):
        scale = np.sqrt(model.weight_variance / len(kernel)) if kernel is not first else 1
        layer.kernel[...] = jnp.asarray(kernel / scale, jnp.float32)
    return model, jnp.asarray(x, jnp.float32)


@structures
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_steps_of_a_fitted_batch_tend_to_zero_with_the_gradient(structure, fisher):
    """Without the floor each structure ends in NaN, from margins between 40 and 100 on."""
    norms = []
    for margin in (45, 60, 80, 120, 300):
        model, x = fitted(margin)
        step = ng.natural_gradient(
            *(model, x, Y),
            structure=structure,
            loss=ng.SoftmaxCrossEntropy(),
            damping=ng.RelativeDamping(RATIO),
            fisher=fisher,
            key=jax.random.key(0),
        )
        assert np.isfinite(flatten(step)).all(), margin
        norms.append(np.linalg.norm(flatten(step)))
    assert norms == sorted(norms, reverse=True)
    assert norms[0] < 1
    assert norms[2] < 1e-9


@structures
def test_dead_layers_stand_still(structure):
    model = make_mlp((6, 9, 9, 3), 0, np.float32, activation="relu")
    model.layers[1].kernel[...] = -jnp.abs(model.layers[1].kernel[...])
    x = jax.random.normal(jax.random.key(1), (7, 6))
    step = ng.natural_gradient(
        *(model, x, Y),
        structure=structure,
        loss=ng.MeanSquaredError(),
        damping=ng.RelativeDamping(RATIO),
    )
    assert np.array_equal(flatten(step), np.zeros_like(flatten(step)))


@structures
def test_a_zero_residual_gives_a_zero_step(structure):
    model, x = fitted(3)
    step = ng.natural_gradient(
        *(model, x, model(x)),
        structure=structure,
        loss=ng.MeanSquaredError(),
        damping=ng.RelativeDamping(RATIO),
        fisher="empirical",
    )
    assert np.array_equal(flatten(step), np.zeros_like(flatten(step)))


def test_the_floor_is_the_square_of_the_rounding_unit():
    damping = ng.RelativeDamping(RATIO)
    scales = jnp.asarray([0.0, 1e-30, 1e-5, 2.0], jnp.float32)
    expected = RATIO * np.asarray([EPS**2, EPS**2, 1e-5, 2.0])
    np.testing.assert_allclose(damping.times(scales), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "ratio", [0, -1e-3, np.nan, np.inf, np.float32(0), "text", None, True, 1j, np.ones(2)], ids=str
)
def test_ratios_that_are_no_positive_numbers(ratio):
    with pytest.raises(ValueError, match="ratio of RelativeDamping must be"):
        ng.RelativeDamping(ratio)


def test_a_ratio_of_another_library_is_a_number():
    assert ng.RelativeDamping(np.float64(RATIO)) == ng.RelativeDamping(RATIO)
