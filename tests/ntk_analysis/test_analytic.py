"""Infinite-width layer kernels: the tail oracle, the diagonal, blocks, wide networks, bad input."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis import analytic
from ntk_analysis.analytic import PARTS, AnalyticKernels, analytic_kernels, analytic_layer_kernels
from ntk_analysis.engines import stax, stax_activation
from ntk_analysis.infinite_width import infinite_width_limit
from ntk_analysis.reproduce.karakida_osawa.common import problem
from ntk_analysis.reproduce.karakida_osawa.kernels import reference_kernels, relu_expectations

INPUTS = 5


def make_model(activation="relu", depth=3, bias=0.0, outputs=1):
    widths = (INPUTS, *[2] * (depth - 1), outputs)
    return ng.MLP(widths, activation=activation, bias_variance=bias, rngs=nnx.Rngs(0))


def make_inputs(count, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, INPUTS))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def everything(kernels: AnalyticKernels) -> dict[str, np.ndarray]:
    return dict(kernels.arrays)


def tails(model, x1, x2):
    """The NTK of the output when it is set to zero behind layer l, for l = 0..L."""
    affine = stax().Dense(1, model.weight_variance**0.5, model.bias_variance**0.5)[2]
    activation = stax_activation(model.activation)[2]
    found, depth = [], len(model.layers)
    with jax.enable_x64(True):
        for cut in range(depth + 1):
            kernel = affine(x1, x2, None)
            for layer in range(1, depth + 1):
                if layer > 1:
                    kernel = affine(activation(kernel))
                if layer == cut:
                    kernel = kernel.replace(ntk=0 * kernel.ntk)
            found.append(np.asarray(kernel.ntk))
    return found


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_layer_kernels_are_differences_of_tails(activation):
    # an oracle with neural-tangents' own composition: Theta_l is what layer l adds
    model = make_model(activation, depth=4, bias=0.2)
    x1, x2 = make_inputs(4), make_inputs(3, 1)
    found = analytic_layer_kernels(model, x1, x2)
    after = tails(model, x1, x2)
    assert np.all(after[-1] == 0)
    for layer, kernel in enumerate(found, 1):
        np.testing.assert_allclose(kernel, after[layer - 1] - after[layer], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("activation", "depth"), [("relu", 4), ("tanh", 3), ("gelu", 3)])
def test_whole_kernels_are_those_of_neural_tangents(activation, depth):
    """Those of our own engine: their composition, their closed forms."""
    model, x1, x2 = make_model(activation, depth, bias=0.1), make_inputs(4), make_inputs(3, 1)
    found = analytic_kernels(model, x1, x2, engine="natgrad")
    with jax.enable_x64(True):
        theirs = infinite_width_limit(model).network[2](x1, x2, ("nngp", "ntk"))
        np.testing.assert_allclose(found.nngp, theirs.nngp, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.ntk, theirs.ntk, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(sum(found.tangent), found.ntk, rtol=1e-14)
    for q, b, theta in zip(found.inputs, found.derivatives, found.tangent, strict=True):
        np.testing.assert_allclose(q * b, theta, rtol=1e-15)
    np.testing.assert_array_equal(found.nngp, found.inputs[-1])
    np.testing.assert_array_equal(found.derivatives[-1], np.ones((4, 3)))


@pytest.mark.parametrize("depth", [1, 2, 20])
def test_any_depth(depth):
    model, x = make_model(depth=depth, bias=0.1), make_inputs(5)
    found = analytic_kernels(model, x)
    expected = reference_kernels(x, None, [(2.0, 0.1)] * depth, relu_expectations)
    assert len(found.tangent) == depth
    for name in ("tangent", "inputs", "derivatives"):
        for ours, reference in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-11)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_diagonal_of_an_activation_with_a_kink_is_exact(activation):
    model, x = make_model(activation, depth=5), make_inputs(40)
    slope = {"relu": 0.5, "leaky_relu": (1 + 0.01**2) / 2}[activation]
    for kernels in analytic_kernels(model, x), analytic_kernels(model, np.repeat(x[:9], 2, axis=0)):
        for layer, kernel in enumerate(kernels.derivatives, 1):
            exact = (2 * slope) ** (5 - layer)
            np.testing.assert_allclose(np.diag(kernel), exact, rtol=1e-15)
    # without knowing that both sets are the same
    blind = analytic_kernels(model, x, x.copy())
    exact = analytic_kernels(model, x)
    for one, other in zip(blind.derivatives, exact.derivatives, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)
    off = ~np.eye(40, dtype=bool)
    for one, other in zip(blind.tangent, exact.tangent, strict=True):
        np.testing.assert_allclose(one[off], other[off], rtol=1e-12)


def test_float32_inputs_keep_the_diagonal_exact():
    # norms are off by 6e-8, which arccos would turn into 2e-4
    x = make_inputs(30).astype(np.float32)
    for kernel in analytic_kernels(make_model(), x, parts=("derivatives",)).derivatives:
        assert kernel.dtype == np.float64
        np.testing.assert_array_equal(np.diag(kernel), 1.0)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_blocks_make_no_difference(monkeypatch, activation):
    model, x1, x2 = make_model(activation, bias=0.1), make_inputs(11), make_inputs(7, 1)
    whole, cross = analytic_kernels(model, x1), analytic_kernels(model, x1, x2)
    monkeypatch.setattr(analytic, "_BLOCK", 4)
    told = []
    blocks = analytic_kernels(model, x1, progress=lambda *at: told.append(at))
    assert told == [(done, 6) for done in range(1, 7)]
    cut = analytic_kernels(model, x1, x2, progress=lambda *at: told.append(at))
    assert told[6:] == [(done, 6) for done in range(1, 7)]
    for one, other in ((whole, blocks), (cross, cut)):
        for name, kernel in everything(one).items():
            # the sums of the first product may be taken in another order
            np.testing.assert_allclose(other.arrays[name], kernel, rtol=1e-14, atol=1e-16)
    for name, kernel in everything(blocks).items():
        np.testing.assert_allclose(kernel, kernel.T, rtol=1e-14, atol=1e-16, err_msg=name)


def test_more_inputs_than_a_block():
    x = make_inputs(analytic._BLOCK + 3)
    found = analytic_kernels(make_model(), x, parts=("ntk",)).ntk
    rows = [0, 100, analytic._BLOCK - 1, analytic._BLOCK, analytic._BLOCK + 2]
    few = analytic_kernels(make_model(), x[rows], parts=("ntk",)).ntk
    np.testing.assert_allclose(found[np.ix_(rows, rows)], few, rtol=1e-13, atol=1e-15)


def test_finite_networks_approach_the_kernels_at_the_rate_of_the_root():
    x, widths, seeds = make_inputs(4), (32, 2048), 8
    theory = analytic_layer_kernels(make_model(), x)
    errors = np.zeros((2, 3))
    for row, width in zip(errors, widths, strict=True):
        for seed in range(seeds):
            model = problem((INPUTS, width, width, 1), 1, activation="relu", seed=seed).model
            for layer, (found, limit) in enumerate(
                zip(na.empirical_layer_kernels(model, x), theory, strict=True)
            ):
                row[layer] += np.linalg.norm(found - limit) / np.linalg.norm(limit) / seeds
    slopes = np.diff(np.log(errors), axis=0) / np.diff(np.log(widths))
    assert np.all((slopes > -0.7) & (slopes < -0.3)), slopes
    assert errors[1].max() < 0.1


def test_parts_are_those_asked_for():
    model, x = make_model(), make_inputs(3)
    found = analytic_kernels(model, x, parts=("ntk", "inputs"))
    assert sorted(found.arrays) == ["inputs.1", "inputs.2", "inputs.3", "ntk"]
    assert len(found.forward) == 3
    for part in ("tangent", "derivatives", "nngp"):
        with pytest.raises(ValueError, match=f"{part} was not computed: ask for parts="):
            getattr(found, part)
    assert len(analytic_kernels(model, x, parts=PARTS).arrays) == 3 * 3 + 2


def test_width_parameters_and_outputs_do_not_matter_and_precision_stays():
    x = make_inputs(3)
    first = analytic_layer_kernels(make_model(), x)
    other = ng.MLP((INPUTS, 9, 4, 3), rngs=nnx.Rngs(7))
    for one, two in zip(first, analytic_layer_kernels(other, x), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, two, rtol=1e-15)
    assert not jax.config.jax_enable_x64


def test_bad_input(monkeypatch, tmp_path):
    model, x = make_model(), make_inputs(4)
    with pytest.raises(ValueError, match=r"parts of an MLP must be some of .* got \('kernel',\)"):
        analytic_kernels(model, x, parts=("kernel",))
    with pytest.raises(ValueError, match="parts of an MLP must be some of"):
        analytic_kernels(model, x, parts=())
    with pytest.raises(TypeError, match="Linear has no infinite-width limit"):
        analytic_kernels(nnx.Linear(INPUTS, 1, rngs=nnx.Rngs(0)), x)
    with pytest.raises(ValueError, match=r"x1 must have shape \(N, 5\), got \(4, 3\)"):
        analytic_kernels(model, x[:, :3])
    with pytest.raises(ValueError, match=r"x2 must have shape \(N, 5\), got \(4, 4\)"):
        analytic_layer_kernels(model, x, x[:, :4])
    with pytest.raises(TypeError, match="x1 must be a floating array, got dtype int"):
        analytic_kernels(model, np.ones((4, INPUTS), int))
    with pytest.raises(ValueError, match="x2 has 1 NaN"):
        analytic_kernels(model, x, np.where(x == x[0, 0], np.nan, x))
    with pytest.raises(ValueError, match="the batch is empty: x1"):
        analytic_kernels(model, x[:0])
    monkeypatch.setattr(analytic, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"11 kernels of 4 x 4 need .* give store="):
        analytic_kernels(model, x)
    assert analytic_kernels(model, x, parts=("ntk",)).ntk.shape == (4, 4)
    assert len(analytic_kernels(model, x, store=tmp_path).arrays) == 11


def test_inputs_of_zero_are_refused_without_biases(tmp_path):
    x = make_inputs(4)
    x[2] = 0
    with pytest.raises(ValueError, match="not positive: sample 2 of x1 has the variance 0"):
        analytic_kernels(make_model(), x, store=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not positive: sample 2 of x2"):
        analytic_kernels(make_model(), make_inputs(4), x)
    found = analytic_kernels(make_model(bias=0.1), x)
    assert all(np.isfinite(kernel).all() for kernel in found.arrays.values())
