"""Softmax cross-entropy where samples are confidently right or wrong, against 330 digits."""

from dataclasses import replace
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from natgrad_reference import flatten, forward, loss_terms, make_mlp, reference, solve_dense

import natgrad_flax as ng

LOSSES = [ng.SoftmaxCrossEntropy(), ng.SoftmaxCrossEntropy(1e-3)]
SAMPLES = 80


def in_330_digits(outputs, targets):
    """r and H of one sample, and the scale of the rounding of r, in float64 at the end."""
    with localcontext() as context:
        context.prec, context.Emin = 330, -100_000
        z, y = ([Decimal(float(v)) for v in row] for row in (outputs, targets))
        weights = [(v - max(z)).exp() for v in z]
        p = [v / sum(weights) for v in weights]
        r = [a * sum(y) - b for a, b in zip(p, y, strict=True)]
        h = [[a * ((i == j) - b) for j, b in enumerate(p)] for i, a in enumerate(p)]
        winner = int(np.argmax(outputs))
        scale = sum(a + b for j, (a, b) in enumerate(zip(p, y, strict=True)) if j != winner)
        return (np.asarray(a, float) for a in (r, h, scale))


def logits_and_targets(c, dtype):
    """Gaps from 0 to 1e4 over any winner; hard, smoothed and soft labels of any class."""
    rng = np.random.default_rng(c)
    gaps = np.concatenate(
        [[0, 10, 20, 30, 40, 50, 60, 88, 100, 700, 1e4], 10 ** rng.uniform(-2, 4, SAMPLES - 11)]
    )
    outputs = rng.normal(size=(SAMPLES, c))
    outputs[np.arange(SAMPLES), rng.integers(0, c, SAMPLES)] += gaps
    hard = np.eye(c)[rng.integers(0, c, SAMPLES)]
    smooth = 0.9 * hard + 0.1 / c
    soft = rng.dirichlet(np.ones(c), SAMPLES)
    kind = rng.integers(0, 4, (SAMPLES, 1))
    targets = np.where(kind < 2, hard, np.where(kind == 2, smooth, soft))
    return outputs.astype(dtype), targets.astype(dtype), gaps


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("c", [2, 3, 10])
def test_residual_and_factor_are_exact_to_rounding(c, dtype, loss):
    outputs, targets, gaps = logits_and_targets(c, dtype)

    @jax.jit
    def terms(f, y):
        return loss.residual(f, y), loss.fisher(f), loss.factor(f), loss.coefficients(f, y)

    r, h, factor, w = (np.asarray(a, np.float64) for a in terms(outputs, targets))
    assert all(np.isfinite(a).all() for a in (r, h, factor, w))
    least = c * np.finfo(dtype).tiny  # below, entries are flushed to zero
    for n, gap in enumerate(gaps):
        true_r, true_h, scale = in_330_digits(outputs[n], targets[n])
        true_h = true_h + loss.output_damping * np.eye(c)
        size = np.linalg.norm(true_h)
        # the gap itself is rounded: a relative error of eps gap in a small probability
        eps = np.finfo(dtype).eps * (8 + min(gap, 700))
        assert np.linalg.norm(r[n] - true_r) <= eps * scale + least
        assert np.linalg.norm(factor[n] @ w[n] - true_r) <= 2 * eps * scale + least
        assert np.linalg.norm(h[n] - true_h) <= eps * size + least
        assert (
            np.linalg.norm(factor[n] @ factor[n].T - true_h)
            <= 2 * eps * size + 2 * (c * least) ** 0.5
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("c", [2, 10])
def test_sampled_residuals_are_those_of_the_drawn_classes(c):
    outputs, _, _ = logits_and_targets(c, np.float32)
    drawn = np.asarray(LOSSES[0].sample(jax.random.key(0), jnp.asarray(outputs), 4), np.float64)
    for n, sample in enumerate(outputs):
        for column in 2 * drawn[n].T:
            label = np.argmin(column) if column.any() else np.argmax(sample)
            true_r, _, scale = in_330_digits(sample, np.eye(c)[label])
            assert np.linalg.norm(column - true_r) <= 2e-5 * scale + 1e-37


STRUCTURES = [
    ng.Exact(),
    ng.Exact(space="parameter"),
    ng.BlockDiagonal(),
    ng.LayerWise(((1.0, 0.4), (0.4, 1.0))),
    ng.KFAC(),
    ng.KFAC(split="pi", space="parameter"),
    ng.UnitWise(),
    ng.Diagonal(),
    ng.QuasiDiagonal(),
]
GAPS = [15, 40, 88, 1e3, 1e4]


def confident(gap, dtype):
    """A network that prefers class 1 of the first sample, and of no other, by about a gap."""
    model = make_mlp((6, 9, 3), 0, dtype, activation="relu")
    first, last = (np.asarray(layer.kernel[...]).copy() for layer in model.layers)
    first[5] = 0
    first[:, 0] = [0, 0, 0, 0, 0, 20]
    last[0] = [0, gap, 0]
    for layer, kernel in zip(model.layers, (first, last), strict=True):
        layer.kernel[...] = jnp.asarray(kernel, dtype)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 6))
    x[:, 5] = [1, 0, 0, 0, 0, 0, 0]
    return model, jnp.asarray(x, dtype)


def targets(label, dtype):
    return jnp.eye(3, dtype=dtype)[jnp.asarray([label, 0, 1, 2, 0, 1, 2])]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("structure", "dtype"),
    [(structure, np.float32) for structure in STRUCTURES]
    + [(structure, np.float64) for structure in (ng.Exact(), ng.KFAC())],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value),
)
def test_steps_of_a_wrong_sample_are_those_of_the_dense_fisher(structure, dtype):
    loss = ng.SoftmaxCrossEntropy()
    for gap in GAPS:
        model, x = confident(gap, dtype)
        exact, _ = confident(gap, np.float64)
        for label in (0, 1, 2):
            y = targets(label, dtype)
            dense = reference(exact, np.asarray(x, np.float64), np.asarray(y, np.float64), loss)
            for damping in (1e-3, 1e3):
                found = ng.natural_gradient(
                    model, x, y, structure=structure, loss=loss, damping=jnp.asarray(damping, dtype)
                )
                wanted, _ = solve_dense(structure, dense, damping)
                error = np.linalg.norm(flatten(found) - wanted) / np.linalg.norm(wanted)
                assert error < (2e-3 if dtype == np.float32 else 1e-9), (gap, label, damping, error)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", [ng.Exact(), ng.BlockDiagonal()], ids=repr)
@pytest.mark.parametrize("gap", [45, 90, 1e4])
def test_zero_damping_drops_what_is_outside_of_the_range(structure, gap):
    """A class of probability zero to rounding has no Fisher; the pseudo-inverse ignores it."""
    loss = ng.SoftmaxCrossEntropy()
    (model, x), y = confident(gap, np.float64), targets(2, np.float64)
    residual, fisher = loss_terms(loss, forward(model, np.asarray(x))[2], np.asarray(y))
    values, vectors = np.linalg.eigh(fisher)
    kept = values > 1e-15 * values.max()
    seeds = np.swapaxes(vectors * np.sqrt(np.where(kept, values, 0))[:, None, :], 1, 2)
    inside = np.einsum("ncs,ns,nds,nd->nc", vectors, kept, vectors, residual)
    dense = reference(model, x, y, loss, seeds)
    dense = replace(dense, gradient=dense.jacobian.T @ inside.reshape(-1) / len(x))
    found = ng.natural_gradient(model, x, y, structure=structure, loss=loss)
    wanted, _ = solve_dense(structure, dense, 0.0)
    assert np.linalg.norm(flatten(found) - wanted) < 1e-7 * np.linalg.norm(wanted)
