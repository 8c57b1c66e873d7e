"""Losses from one function, against the losses that are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_flax as ng


def softmax(f, y):
    return jax.nn.logsumexp(f) - f[y]


def poisson(f, y):
    return jnp.sum(jnp.exp(f) - y * f)


def draw_class(key, f):
    return jax.random.categorical(key, f)


F = np.random.default_rng(0).normal(size=(5, 3))
LABELS = jnp.asarray([0, 2, 1, 1, 0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [ng.GaussNewton, ng.Likelihood])
@pytest.mark.parametrize(
    ("function", "written", "targets"),
    [
        (softmax, ng.SoftmaxCrossEntropy(), LABELS),
        (poisson, ng.Poisson(), jnp.asarray(np.abs(np.round(3 * F)))),
    ],
    ids=["softmax", "poisson"],
)
def test_terms(make, function, written, targets):
    loss, f = make(function), jnp.asarray(F)
    np.testing.assert_allclose(loss.residual(f, targets), written.residual(f, targets), atol=1e-14)
    np.testing.assert_allclose(loss.fisher(f, targets), written.fisher(f), atol=1e-14)
    factor = loss.factor(f, targets)
    np.testing.assert_allclose(factor @ factor.mT, written.fisher(f), atol=1e-13)
    w = loss.coefficients(f, targets)
    np.testing.assert_allclose(
        jnp.einsum("ncs,ns->nc", factor, w), written.residual(f, targets), atol=1e-13
    )
    loss.check_curvature(f, targets)


@pytest.mark.usefixtures("x64")
def test_drawn_targets():
    f = jnp.asarray(F)
    draws = ng.Likelihood(softmax, draw_class).sample(jax.random.key(1), f, 40_000)
    np.testing.assert_allclose(draws @ draws.mT, ng.SoftmaxCrossEntropy().fisher(f), atol=0.02)


def test_a_hessian_that_is_not_positive():
    loss = ng.GaussNewton(lambda f, y: jnp.sum(jnp.cos(f - y)))
    f = jnp.asarray([[3.0, 3.1], [3.0, 0.0]])
    with pytest.raises(ValueError, match=r"the eigenvalue -1 at row 1 of the outputs, .* 1 of 2"):
        loss.check_curvature(f, jnp.zeros((2, 2)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda f, y: f - y, r"it returns float32 of shape \(3,\): sum over its entries"),
        (lambda f, y: 1.0, "it returns a float"),
        (lambda f, y: jnp.sum(f > y), r"it returns int32 of shape \(\)"),
    ],
)
def test_functions_without_a_scalar(function, message):
    f = jnp.asarray(F, jnp.float32)
    for name in ("values", "residual"):
        with pytest.raises(TypeError, match=message):
            getattr(ng.GaussNewton(function), name)(f, f)


def test_what_cannot_be_called_or_drawn():
    for make in (ng.GaussNewton, ng.Likelihood):
        with pytest.raises(TypeError, match=rf"{make.__name__} needs a function l\(f, y\).*got 3"):
            make(3)
    with pytest.raises(TypeError, match=r"sampler .* must be a function of a key"):
        ng.Likelihood(softmax, 3)
    key, f = jax.random.key(0), jnp.asarray(F)
    with pytest.raises(ValueError, match="no distribution that targets could be drawn from"):
        ng.GaussNewton(softmax).sample(key, f, 1)
    with pytest.raises(ValueError, match=r"give ng.Likelihood a sampler\(key, f\)"):
        ng.Likelihood(softmax).sample(key, f, 1)
