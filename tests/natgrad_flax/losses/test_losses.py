"""Losses against automatic differentiation and the definition of the Fisher information."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_flax as ng

SMOOTH = ng.SoftmaxCrossEntropy(label_smoothing=0.3)
HESSIAN_IS_FISHER = [
    ng.MeanSquaredError(),
    ng.SoftmaxCrossEntropy(),
    ng.SoftmaxCrossEntropy(0.2),
    SMOOTH,
    ng.SigmoidCrossEntropy(),
    ng.Poisson(),
]
OTHERS = [ng.GaussianNegativeLogLikelihood(), ng.Huber(0.7)]
LOSSES = [*HESSIAN_IS_FISHER, *OTHERS]
C = 4


def batch(loss=None, dtype=jnp.float64):
    """Outputs (6, 4), and targets of the form that a loss takes."""
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(3 * rng.normal(size=(6, C)), dtype)
    labels = np.eye(C)[rng.integers(0, C, 6)]
    if isinstance(loss, ng.SigmoidCrossEntropy):
        labels = rng.integers(0, 2, (6, C))
    if isinstance(loss, ng.Poisson):
        labels = rng.integers(0, 9, (6, C))
    if isinstance(loss, ng.GaussianNegativeLogLikelihood):
        labels = rng.normal(size=(6, C // 2))
    if isinstance(loss, ng.Huber):
        labels = np.asarray(outputs) + rng.normal(size=(6, C))
    return outputs, jnp.asarray(labels, dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
class TestAgainstDefinition:
    def test_residual_is_n_times_the_gradient(self, loss):
        outputs, targets = batch(loss)
        slope = jax.grad(loss)(outputs, targets)
        np.testing.assert_allclose(loss.residual(outputs, targets), 6 * slope, atol=1e-12)

    def test_mean_of_values(self, loss):
        outputs, targets = batch(loss)
        found = loss(outputs, targets)
        np.testing.assert_allclose(found, jnp.mean(loss.values(outputs, targets)), rtol=1e-14)

    def test_factor_and_coefficients(self, loss):
        outputs, targets = batch(loss)
        factor = loss.factor(outputs)
        np.testing.assert_allclose(factor @ factor.swapaxes(1, 2), loss.fisher(outputs), atol=1e-12)
        assert np.linalg.matrix_rank(np.asarray(factor)).min() == factor.shape[2]
        w = loss.coefficients(outputs, targets)
        np.testing.assert_allclose(
            jnp.einsum("ncs,ns->nc", factor, w), loss.residual(outputs, targets), atol=1e-12
        )

    def test_product_with_the_fisher(self, loss):
        outputs, targets = batch(loss)
        vectors = jnp.sin(jnp.arange(outputs.size, dtype=float)).reshape(outputs.shape)
        np.testing.assert_allclose(
            loss.fisher_product(outputs, vectors, targets),
            jnp.einsum("ncd,nd->nc", loss.fisher(outputs), vectors),
            atol=1e-12,
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", HESSIAN_IS_FISHER, ids=repr)
def test_fisher_is_the_hessian_in_the_outputs(loss):
    outputs, targets = batch(loss)
    hessian = jax.hessian(loss)(outputs, targets)
    damping = getattr(loss, "output_damping", 0.0) * np.eye(C)
    for n in range(6):
        np.testing.assert_allclose(
            loss.fisher(outputs)[n], 6 * hessian[n, :, n, :] + damping, atol=1e-11
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "loss",
    [loss for loss in LOSSES if not getattr(loss, "output_damping", 0) and loss is not SMOOTH],
    ids=repr,
)
def test_sampled_fisher_is_unbiased(loss):
    outputs, _ = batch(loss)
    outputs = outputs[:2] / 3  # so that the draws of rates are not too wide
    draws = loss.sample(jax.random.key(0), outputs, 50_000)
    estimate = draws @ draws.swapaxes(1, 2)
    size = np.abs(loss.fisher(outputs)).max()
    np.testing.assert_allclose(estimate, loss.fisher(outputs), atol=0.03 * size)
    np.testing.assert_allclose(jnp.sum(draws, axis=2) / 50_000**0.5, 0, atol=0.03 * size)


def second_moment(loss, f, targets, weights):
    """sum_y w r r^T over targets with their probabilities."""
    outputs = jnp.broadcast_to(f, (len(targets), len(f)))
    r = np.asarray(loss.residual(outputs, jnp.asarray(targets, outputs.dtype)))
    return np.einsum("y,yi,yj->ij", np.asarray(weights), r, r)


@pytest.mark.usefixtures("x64")
class TestExpectations:
    """H is the second moment of the residual over the targets of the model, enumerated."""

    def test_classes(self):
        f = batch()[0][0]
        found = second_moment(ng.SoftmaxCrossEntropy(), f, np.eye(C), jax.nn.softmax(f))
        np.testing.assert_allclose(found, ng.SoftmaxCrossEntropy().fisher(f[None])[0], atol=1e-13)

    def test_binary(self):
        f = batch()[0][0]
        bits = np.array(list(np.ndindex(*[2] * C)))
        p = np.asarray(jax.nn.sigmoid(f))
        weights = np.prod(np.where(bits, p, 1 - p), axis=1)
        found = second_moment(ng.SigmoidCrossEntropy(), f, bits, weights)
        np.testing.assert_allclose(found, ng.SigmoidCrossEntropy().fisher(f[None])[0], atol=1e-13)

    def test_counts(self):
        f, counts = jnp.asarray([0.7]), np.arange(60.0)[:, None]
        loss = ng.Poisson()
        weights = np.exp(-loss.values(jnp.broadcast_to(f, (60, 1)), counts))
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
        found = second_moment(loss, f, counts, weights)
        np.testing.assert_allclose(found, loss.fisher(f[None])[0], rtol=1e-12)

    @pytest.mark.parametrize("loss", OTHERS, ids=repr)
    def test_densities_by_quadrature(self, loss):
        f = jnp.asarray([0.3, -0.8]) if loss.target_shape((1, 2)) == (1, 1) else jnp.asarray([0.3])
        y = np.linspace(-60, 60, 1_200_001)[:, None]
        density = np.exp(-loss.values(jnp.broadcast_to(f, (len(y), len(f))), y))
        found = second_moment(loss, f, y, density / density.sum())
        np.testing.assert_allclose(found, loss.fisher(f[None])[0], atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_smoothing_is_that_of_the_targets():
    outputs, targets = batch()
    soft = 0.7 * targets + 0.3 / C
    plain = ng.SoftmaxCrossEntropy()
    np.testing.assert_allclose(SMOOTH(outputs, targets), plain(outputs, soft), rtol=1e-14)
    for name in ("residual", "coefficients"):
        found = getattr(SMOOTH, name)(outputs, targets)
        np.testing.assert_allclose(found, getattr(plain, name)(outputs, soft), atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", [ng.SoftmaxCrossEntropy(), SMOOTH, ng.SoftmaxCrossEntropy(0.2)])
def test_class_numbers_are_one_hot_rows(loss):
    outputs, targets = batch()
    labels = jnp.argmax(targets, axis=1)
    np.testing.assert_allclose(loss(outputs, labels), loss(outputs, targets), rtol=1e-14)
    for name in ("values", "residual", "coefficients"):
        found = getattr(loss, name)(outputs, labels)
        np.testing.assert_allclose(found, getattr(loss, name)(outputs, targets), atol=1e-14)


def test_class_numbers_make_no_rows():
    """Of 50,000 classes the compiled loss holds the logarithms alone, and the residual nothing."""
    outputs, labels = jnp.zeros((64, 50_000)), jnp.zeros(64, jnp.int32)
    loss = ng.SoftmaxCrossEntropy()
    for function, rows in ((loss, 2), (loss.residual, 2)):
        held = jax.jit(function).lower(outputs, labels).compile().memory_analysis()
        assert held.temp_size_in_bytes <= rows * outputs.nbytes


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_positions_and_weights(loss):
    """The mean over what is not masked, whatever stands in the rest."""
    outputs, targets = batch(loss)
    places = (2, 3)
    weights = jnp.asarray([[1, 0, 1], [0, 1, 1]], bool)
    kept = np.flatnonzero(weights)
    odd = jnp.where(weights.reshape(-1, 1), outputs, jnp.inf)
    found = loss(odd.reshape(*places, -1), targets.reshape(*places, -1), weights)
    np.testing.assert_allclose(found, loss(outputs[kept], targets[kept]), rtol=1e-13)
    samples = loss(outputs.reshape(*places, -1), targets.reshape(*places, -1), jnp.arange(1.0, 3))
    parts = loss(outputs[:3], targets[:3]) + 2 * loss(outputs[3:], targets[3:])
    np.testing.assert_allclose(samples, parts / 3, rtol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", [ng.SigmoidCrossEntropy(), ng.Poisson()], ids=repr)
def test_extreme_outputs(loss, dtype):
    """r = R w to rounding, and finite, where the Fisher underflows."""
    top = 80.0 if isinstance(loss, ng.Poisson) else 1e4
    outputs = jnp.asarray([[-1e4, -300, -90, -20, 0, 20, top]], dtype)
    for value in (0, 1):
        targets = jnp.full_like(outputs, value)
        r, w = loss.residual(outputs, targets), loss.coefficients(outputs, targets)
        found = np.einsum("ncs,ns->nc", loss.factor(outputs), w)
        assert np.isfinite(w).all()
        np.testing.assert_allclose(found, r, rtol=4 * np.finfo(dtype).eps)
    if isinstance(loss, ng.SigmoidCrossEntropy):
        near = loss.residual(jnp.full((1, 1), 40.0, dtype), jnp.ones((1, 1), dtype))
        np.testing.assert_allclose(near, -np.exp(-40.0), rtol=1e-5)


def test_confident_wrong_predictions_stay_finite():
    outputs = jnp.asarray([[300.0, 0.0, -300.0], [0.0, 90.0, 0.0]], jnp.float32)
    targets = jnp.asarray([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], jnp.float32)
    loss = ng.SoftmaxCrossEntropy()
    assert np.isfinite(loss.coefficients(outputs, targets)).all()
    assert np.isfinite(loss.factor(outputs)).all()


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "a"])
@pytest.mark.parametrize("name", ["output_damping", "label_smoothing"])
def test_settings_of_softmax_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        ng.SoftmaxCrossEntropy(**{name: value})


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="label_smoothing must be below 1, got 1"):
        ng.SoftmaxCrossEntropy(label_smoothing=1)
    with pytest.raises(ValueError, match="delta must be positive"):
        ng.Huber(0)
    with pytest.raises(ValueError, match=r"even number of outputs.*returns \(4, 3\)"):
        ng.GaussianNegativeLogLikelihood().target_shape((4, 3))


def test_texts_of_losses_are_those_that_results_are_kept_under():
    assert repr(ng.SoftmaxCrossEntropy()) == "SoftmaxCrossEntropy(output_damping=0.0)"
    assert repr(SMOOTH) == "SoftmaxCrossEntropy(output_damping=0.0, label_smoothing=0.3)"
