"""Infinite-width kernels of ConvNets: against neural-tangents, explicit patches, wide networks."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis import analytic, conv_kernels
from ntk_analysis._neural_tangents import stax
from ntk_analysis.analytic import analytic_kernels, analytic_layer_kernels
from ntk_analysis.infinite_width import infinite_width_limit
from ntk_analysis.reproduce.karakida_osawa.kernels import relu_expectations

SHAPE = (5, 4, 2)


def make_model(pooling="flatten", channels=(2, 3), outputs=1, shape=SHAPE, **options):
    chosen = {"kernel_size": (3, 2), "strides": (1, 2)} | options
    return ng.ConvNet(shape, channels, outputs, pooling=pooling, **chosen, rngs=nnx.Rngs(0))


def make_images(count, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=(count, *shape))


def cut():
    """A stax layer that sets the tangent kernel to zero."""
    init, apply, kernel_of = stax().Identity()

    @functools.wraps(kernel_of)
    def zero(kernel, **options):
        kernel = kernel_of(kernel, **options)
        return kernel.replace(ntk=0 * kernel.ntk)

    return init, apply, zero


def tails(model, x1, x2):
    """(NTK of the output where it is set to zero behind layer l, for l = 0..L; the NNGP kernel)."""
    lib, bias = stax(), model.bias_variance**0.5 or None
    phi = {"relu": lib.Relu, "erf": lib.Erf}[model.activation]()
    scales = {"W_std": model.weight_variance**0.5, "b_std": bias}
    layers = [
        [
            lib.Conv(width, model.kernel_size, (stride,) * 2, model.padding, **scales),
            phi,
        ]
        for width, stride in zip(model.channels, model.strides, strict=True)
    ]
    pool = lib.GlobalAvgPool() if model.pooling == "average" else lib.Flatten()
    layers.append([lib.Dense(1, **scales)])
    layers[-2].append(pool)

    @jax.jit
    def everything(x1, x2):
        found = []
        for place in range(len(layers) + 1):
            blocks = []
            for index, layer in enumerate(layers, 1):
                blocks += [layer[0], cut(), *layer[1:]] if index == place else layer
            found.append(lib.serial(*blocks)[2](x1, x2, ("nngp", "ntk")))
        return [kernel.ntk for kernel in found], found[0].nngp

    with jax.enable_x64(True):
        kernels, nngp = everything(x1, x2)
        return [np.asarray(kernel) for kernel in kernels], np.asarray(nngp)


@pytest.mark.parametrize(
    ("pooling", "padding", "strides", "activation"),
    [
        ("flatten", "SAME", (1, 2), "relu"),
        ("average", "CIRCULAR", (2, 1), "relu"),
        ("flatten", "VALID", (1, 1), "erf"),
    ],
)
def test_layer_kernels_are_differences_of_tails(pooling, padding, strides, activation):
    # the composition of neural-tangents itself: Theta_l is what layer l adds
    model = make_model(
        pooling, padding=padding, strides=strides, activation=activation, bias_variance=0.2
    )
    x1, x2 = make_images(3), make_images(2, 1)
    found = analytic_kernels(model, x1, x2)
    after, nngp = tails(model, x1, x2)
    assert len(found.tangent) == 3
    for layer, kernel in enumerate(found.tangent, 1):
        np.testing.assert_allclose(kernel, after[layer - 1] - after[layer], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(sum(found.tangent), after[0], rtol=1e-13)
    np.testing.assert_allclose(found.ntk, after[0], rtol=1e-13)
    np.testing.assert_allclose(found.nngp, nngp, rtol=1e-13)


def explicit_kernels(model, x):
    """Theta_l from matrices that pick a pixel of each patch, for ReLU, all pairs of positions."""
    shape, n = model.input_shape[:2], len(x)
    pixels = x.reshape(n, -1, x.shape[-1])
    value = np.einsum("ipc,jqc->ijpq", pixels, pixels) / x.shape[-1]
    weight, bias = model.weight_variance, model.bias_variance
    picks, inputs, slopes = [], [], []
    for layer in model.convolutions:
        border, out = layer.border(shape), layer.positions(shape)
        picked = []
        for tap in np.ndindex(*layer.kernel_size):
            pick = np.zeros((*out, *shape))
            for place in np.ndindex(*out):
                at = [
                    p * s + t - before
                    for p, s, t, (before, _) in zip(place, layer.strides, tap, border, strict=True)
                ]
                if all(0 <= a < size for a, size in zip(at, shape, strict=True)):
                    pick[(*place, *at)] = 1
            picked.append(pick.reshape(np.prod(out), -1))
        size = len(picked)
        q = weight / size * sum(pick @ value @ pick.T for pick in picked) + bias
        variance = np.stack([np.diagonal(q[i, i]) for i in range(n)])
        value, slope = relu_expectations(q, variance[:, None, :, None], variance[None, :, None])
        picks.append([pick * np.sqrt(weight / size) for pick in picked])
        inputs.append(q)
        slopes.append(slope)
        shape = out
    count = value.shape[-1]
    if model.pooling == "average":
        seen = np.full((count, count), 1 / count**2)
    else:
        seen = np.eye(count) / count
    tangents = [weight * np.sum(value * seen, axis=(2, 3)) + bias]
    derivative = weight * seen
    for picked, q, slope in zip(reversed(picks), reversed(inputs), reversed(slopes), strict=True):
        inside = derivative * slope
        tangents.insert(0, np.sum(inside * q, axis=(2, 3)))
        derivative = sum(pick.T @ inside @ pick for pick in picked)
    return tangents


@pytest.mark.parametrize("pooling", ["flatten", "average"])
def test_layer_kernels_from_explicit_patches(pooling):
    model = make_model(pooling, (2, 2, 2), strides=(1, 2, 1), bias_variance=0.1)
    x = make_images(3)
    for ours, reference in zip(
        analytic_layer_kernels(model, x), explicit_kernels(model, x), strict=True
    ):
        # the reference loses half of its digits where a position meets itself
        np.testing.assert_allclose(ours, reference, rtol=1e-7)


def layer_jacobians(channels, pooling):
    """A function from seeds and images to K_l of wide networks, from their dense Jacobians."""
    make = functools.partial(make_model, pooling, (channels, channels), bias_variance=0.1)
    graphdef, _ = nnx.split(make())

    @jax.jit
    def kernels(state, x):
        def outputs(state):
            return nnx.merge(graphdef, state)(x)[:, 0]

        jacobian = jax.jacrev(outputs)(state)

        def gram(part):
            rows = [leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(part)]
            return sum(row @ row.T for row in rows)

        convolutions = jacobian["convolutions"]
        return [gram(convolutions[i]) for i in range(2)] + [gram(jacobian["readout"])]

    def of_seed(seed, x):
        network = ng.ConvNet(
            SHAPE, (channels, channels), 1, kernel_size=(3, 2), strides=(1, 2), pooling=pooling,
            bias_variance=0.1, rngs=nnx.Rngs(seed),
        )  # fmt: skip
        return kernels(nnx.state(network), x.astype(np.float32))

    return of_seed


@pytest.mark.parametrize("pooling", ["flatten", "average"])
def test_wide_networks_have_the_kernels(pooling):
    x = make_images(3)
    of_seed = layer_jacobians(128, pooling)
    found = [[np.asarray(k, np.float64) for k in of_seed(seed, x)] for seed in range(8)]
    limits = analytic_layer_kernels(make_model(pooling, bias_variance=0.1), x)
    for kernels, limit in zip(zip(*found, strict=True), limits, strict=True):
        mean = sum(kernels) / len(kernels)
        assert np.linalg.norm(mean - limit) < 0.06 * np.linalg.norm(limit)


@pytest.mark.parametrize(("pooling", "activation"), [("flatten", "tanh"), ("average", "relu")])
def test_patches_of_zeros_without_biases_add_nothing(pooling, activation):
    x = np.zeros((3, *SHAPE))
    x[:, 2, 0] = make_images(3)[:, 0, 0]
    model = make_model(pooling, activation=activation)
    almost = make_model(pooling, activation=activation, bias_variance=1e-13)
    for ours, nearby in zip(
        analytic_layer_kernels(model, x), analytic_layer_kernels(almost, x), strict=True
    ):
        assert np.all(np.diag(ours) > 0)
        np.testing.assert_allclose(ours, nearby, rtol=2e-5, atol=1e-9)


def test_equal_patches_are_exact():
    # a background is the same patch in every image: on the diagonal of the closed form, too,
    # where it would lose half of the digits of E[phi' phi']
    x = np.ones((2, *SHAPE))
    x[1] *= np.sqrt(2)
    model = make_model("average", (2,), strides=1, kernel_size=1, bias_variance=0.0)
    first, last = analytic_layer_kernels(model, x)
    norms = np.sqrt([[1, 2**0.5], [2**0.5, 2]])
    np.testing.assert_allclose(first, 2 * norms**2, rtol=1e-13)
    np.testing.assert_allclose(last, 2 * norms**2, rtol=1e-13)
    twins = make_images(3)[[0, 1, 0]]
    for kernel in analytic_layer_kernels(make_model(), twins):
        np.testing.assert_allclose(kernel[0], kernel[2], rtol=1e-13)
        np.testing.assert_allclose(kernel[0, 0], kernel[0, 2], rtol=1e-13)


@pytest.mark.parametrize("pooling", ["flatten", "average"])
def test_blocks_and_an_interrupted_run_make_no_difference(pooling, monkeypatch, tmp_path):
    model, x, other = make_model(pooling, bias_variance=0.1), make_images(5), make_images(4, 1)
    whole, cross = analytic_kernels(model, x), analytic_kernels(model, x, other)
    # of 2 samples
    entries = max(infinite_width_limit(model).covariances())
    monkeypatch.setattr(conv_kernels, "_ENTRIES", 4 * entries)

    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 3:
            raise Killed

    told = []
    with pytest.raises(Killed):
        analytic_kernels(model, x, store=tmp_path, progress=kill)
    resumed = analytic_kernels(
        model, x, store=tmp_path, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(4, 6), (5, 6), (6, 6)]
    for name, kernel in whole.arrays.items():
        np.testing.assert_allclose(resumed.arrays[name], kernel, rtol=1e-13, err_msg=name)
    for name, kernel in analytic_kernels(model, x, other).arrays.items():
        np.testing.assert_allclose(kernel, cross.arrays[name], rtol=1e-13, err_msg=name)


def test_channels_parameters_and_outputs_do_not_matter():
    x = make_images(2).astype(np.float32)
    first = analytic_layer_kernels(make_model(), x)
    second = analytic_layer_kernels(make_model(channels=(4, 1), outputs=3), x)
    for one, other in zip(first, second, strict=True):
        assert one.dtype == np.float64
        np.testing.assert_array_equal(one, other)


def test_limit_describes_what_decides_its_kernels():
    limit = na.infinite_width_limit(make_model("average", padding="CIRCULAR", bias_variance=0.3))
    assert limit.depth == 3
    assert limit.covariances() == [400, 400, 36]
    description = dict(limit.description)
    convolutions = description.pop("convolutions")
    assert description == {
        "activation": "relu",
        "engine": "neural-tangents",
        "hermite_terms": None,
        "weight_variances": [2.0] * 3,
        "bias_variances": [0.3] * 3,
        "pooled": True,
    }
    assert [part["strides"] for part in convolutions] == [(1, 1), (2, 2)]
    assert all(part["circular"] for part in convolutions)
    assert na.infinite_width_limit(make_model()) is na.infinite_width_limit(make_model())
    assert na.infinite_width_limit(make_model()).covariances() == [20, 20, 6]


def test_bad_input(monkeypatch):
    model, x = make_model(), make_images(3)
    with pytest.raises(ValueError, match=r"x1 must have shape \(N, 5, 4, 2\), got \(3, 40\)"):
        analytic_kernels(model, x.reshape(3, -1))
    with pytest.raises(ValueError, match=r"x2 must have shape \(N, 5, 4, 2\)"):
        analytic_kernels(model, x, x[..., :1])
    with pytest.raises(ValueError, match=r"parts of a ConvNet must be some of .* got \('inputs',"):
        analytic_kernels(model, x, parts=("inputs",))
    with pytest.raises(ValueError, match="sample 1 of x1 has the variance 0 in layer 1"):
        analytic_kernels(model, x * np.array([1, 0, 1])[:, None, None, None])
    monkeypatch.setattr(analytic, "available_memory", lambda: 2**19)
    large = make_model("average", shape=(32, 32, 3))
    with pytest.raises(ValueError, match=r"1,048,576 covariances between 1,024 .* need 0\.\d GiB"):
        analytic_kernels(large, make_images(2, shape=(32, 32, 3)))


def test_layers_without_a_limit():
    def convolution(**options):
        return ng.Conv(2, 3, (3, 2), **options, rngs=nnx.Rngs(0))

    def dense(model):
        model.readout = nnx.Linear(model.readout.in_features, 1, rngs=nnx.Rngs(0))

    def stock(model):
        model.convolutions[1] = nnx.Conv(2, 3, (3, 2), rngs=nnx.Rngs(0))

    def grouped(model):
        model.convolutions[1] = ng.Conv(2, 4, (3, 2), feature_group_count=2, rngs=nnx.Rngs(0))

    def dilated(model):
        model.convolutions[0] = ng.Conv(2, 2, (2, 2), kernel_dilation=2, rngs=nnx.Rngs(0))

    def sine(model):
        model.activation = "sine"

    for change, message in (
        (dense, r"layer 3 \(Linear\) has no infinite-width limit: it is not an ng.Dense"),
        (stock, r"layer 2 \(Conv\) has no infinite-width limit: it is not an ng.Conv"),
        (grouped, r"layer 2 \(Conv\) .* neither groups nor dilation"),
        (dilated, r"layer 1 \(Conv\) .* neither groups nor dilation"),
        (sine, "activation 'sine' has no infinite-width kernel"),
    ):
        model = make_model()
        change(model)
        with pytest.raises(ValueError, match=message):
            infinite_width_limit(model)


def test_changed_layers_keep_their_own_variances():
    model, x = make_model("flatten", (2, 2), strides=1, bias_variance=0.1), make_images(2)
    before = analytic_layer_kernels(model, x)
    model.readout = ng.Dense(
        model.readout.in_features, 1, weight_variance=6.0, bias_variance=0.1, rngs=nnx.Rngs(0)
    )
    after = analytic_layer_kernels(model, x)
    for layer in range(2):
        np.testing.assert_allclose(after[layer], 3 * before[layer], rtol=1e-13)
    np.testing.assert_allclose(after[2] - 0.1, 3 * (before[2] - 0.1), rtol=1e-13)
