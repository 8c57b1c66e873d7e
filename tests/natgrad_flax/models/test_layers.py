"""The convolution in NTK parametrisation against loops over positions and taps."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng

CASES = {
    "1-d same, stride": ((7,), (3,), {"strides": 2, "bias_variance": 0.3}),
    "1-d same, stride beyond the kernel": ((7,), (2,), {"strides": 3}),
    "1-d valid, groups and dilation": (
        (8,),
        (3,),
        {"padding": "VALID", "kernel_dilation": 2, "feature_group_count": 2},
    ),
    "1-d circular, even kernel": ((6,), (4,), {"padding": "CIRCULAR", "bias_variance": 0.3}),
    "1-d circular, kernel many times the image": ((2,), (7,), {"padding": "CIRCULAR"}),
    "2-d same, all settings": (
        (6, 5),
        (3, 2),
        {
            "strides": (2, 1),
            "kernel_dilation": (1, 2),
            "feature_group_count": 2,
            "bias_variance": 0.3,
        },
    ),
    "2-d valid": ((5, 4), (2, 3), {"padding": "VALID", "strides": (3, 1)}),
    "2-d circular, stride and dilation": (
        (6, 5),
        (3, 3),
        {"padding": "CIRCULAR", "strides": 2, "kernel_dilation": 2},
    ),
    "3-d same, groups": ((4, 3, 2), (2, 3, 1), {"feature_group_count": 2, "strides": (1, 2, 1)}),
    "3-d valid": ((3, 4, 3), (2, 2, 2), {"padding": "VALID"}),
    "3-d circular": ((3, 2, 4), (2, 3, 2), {"padding": "CIRCULAR", "strides": (2, 1, 1)}),
}


def rngs(seed):
    """Of a generator that compiles in a tenth of the default's time."""
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))


def border_and_positions(size, taps, stride, dilation, padding):
    """Positions before the image, and of the outputs, in one dimension."""
    extent = (taps - 1) * dilation + 1
    if padding == "VALID":
        return 0, 1 + (size - extent) // stride
    count = math.ceil(size / stride)
    return max((count - 1) * stride + extent - size, 0) // 2, count


def convolve(x, layer, *, strides, kernel_dilation, padding, groups):
    """Sum over taps and channels of a group, one output position and channel at a time."""
    kernel = np.asarray(layer.kernel[...])
    *taps, fan, outputs = kernel.shape
    spatial = x.shape[1:-1]
    found = [
        border_and_positions(*settings, padding)
        for settings in zip(spatial, taps, strides, kernel_dilation, strict=True)
    ]
    u = np.zeros((len(x), *(count for _, count in found), outputs))
    for position in itertools.product(*(range(count) for _, count in found)):
        for tap in itertools.product(*map(range, taps)):
            at = [
                p * s - low + t * d
                for p, s, (low, _), t, d in zip(
                    position, strides, found, tap, kernel_dilation, strict=True
                )
            ]
            if padding == "CIRCULAR":
                at = [index % size for index, size in zip(at, spatial, strict=True)]
            if any(not 0 <= index < size for index, size in zip(at, spatial, strict=True)):
                continue
            for unit in range(outputs):
                group = unit // (outputs // groups)
                seen = x[(slice(None), *at, slice(group * fan, (group + 1) * fan))]
                u[(slice(None), *position, unit)] += seen @ kernel[(*tap, slice(None), unit)]
    return u


@pytest.mark.parametrize("name", CASES)
def test_conv_is_the_sum_over_taps(name, x64):
    spatial, kernel_size, settings = CASES[name]
    layer = ng.Conv(
        4, 6, kernel_size, weight_variance=1.7, param_dtype=float, rngs=rngs(1), **settings
    )
    x = np.random.default_rng(0).normal(size=(2, *spatial, 4))
    groups = settings.get("feature_group_count", 1)

    def each(value):
        return value if isinstance(value, tuple) else (value,) * len(spatial)

    expected = convolve(
        x,
        layer,
        strides=each(settings.get("strides", 1)),
        kernel_dilation=each(settings.get("kernel_dilation", 1)),
        padding=settings.get("padding", "SAME"),
        groups=groups,
    ) * math.sqrt(1.7 / (math.prod(kernel_size) * 4 / groups))
    if "bias_variance" in settings:
        expected += math.sqrt(0.3) * np.asarray(layer.bias[...])
    u = layer(jnp.asarray(x))
    assert u.dtype == jnp.float64
    np.testing.assert_allclose(u, expected, rtol=1e-12, atol=1e-12)
    assert layer.positions(spatial) == u.shape[1:-1]


def test_attributes_and_shapes():
    layer = ng.Conv(
        6, 4, [3, 2], strides=2, feature_group_count=2, bias_variance=0.25, rngs=rngs(0)
    )
    assert layer.kernel.shape == (3, 2, 3, 4)
    assert layer.bias.shape == (4,)
    assert layer.kernel_size == (3, 2)
    assert layer.strides == (2, 2)
    assert layer.kernel_dilation == (1, 1)
    assert layer.fan_in == 18
    assert layer.weight_scale == pytest.approx(1 / math.sqrt(18))
    assert layer.bias_scale == 0.5
    plain = ng.Conv(6, 4, (3,), rngs=rngs(0))
    assert plain.bias is None
    assert plain.bias_scale is None


def test_variance_over_units_at_initialisation():
    units, weight_variance, bias_variance = 8192, 1.5, 0.4
    layer = ng.Conv(
        4,
        units,
        (3, 2),
        padding="VALID",
        feature_group_count=2,
        weight_variance=weight_variance,
        bias_variance=bias_variance,
        rngs=rngs(5),
    )
    patch = np.random.default_rng(1).normal(size=(3, 2, 4)).astype(np.float32)
    u = np.asarray(layer(jnp.asarray(patch[None]))).reshape(2, units // 2)
    for group in range(2):
        mean_square = np.mean(patch[..., 2 * group : 2 * group + 2] ** 2)
        expected = weight_variance * mean_square + bias_variance
        # the mean of n squared Gaussians has the relative deviation sqrt(2 / n)
        assert np.mean(u[group] ** 2) == pytest.approx(expected, rel=4 * math.sqrt(4 / units))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_conv_keeps_and_promotes_dtypes(dtype):
    layer = ng.Conv(2, 3, (2,), bias_variance=0.1, param_dtype=dtype, rngs=rngs(0))
    assert layer.kernel.dtype == layer.bias.dtype == dtype
    assert layer(jnp.ones((1, 3, 2), dtype)).dtype == dtype
    assert layer(jnp.ones((1, 3, 2), jnp.float32)).dtype == jnp.float32


def test_the_same_seed_gives_the_same_parameters():
    def kernel(seed):
        return np.asarray(ng.Conv(2, 3, (2, 2), rngs=rngs(seed)).kernel[...])

    np.testing.assert_array_equal(kernel(3), kernel(3))
    assert not np.array_equal(kernel(3), kernel(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 0}, "in_features must be a positive integer, got 0"),
        ({"out_features": 2.0}, "out_features must be a positive integer"),
        ({"kernel_size": 3}, "kernel_size must be a tuple of 1 to 3 positive integers"),
        ({"kernel_size": ()}, "kernel_size must be a tuple"),
        ({"kernel_size": (2, 2, 2, 2)}, "kernel_size must be a tuple of 1 to 3"),
        ({"kernel_size": (3, 0)}, "kernel_size must be a tuple"),
        ({"kernel_size": "33"}, "kernel_size must be a tuple"),
        ({"strides": (1, 2, 1)}, "strides must be a positive integer or 2 of them"),
        ({"strides": 0}, "strides must be a positive integer"),
        ({"kernel_dilation": (1, True)}, "kernel_dilation must be a positive integer"),
        ({"padding": "same"}, "unknown padding 'same'; known: .*Did you mean 'SAME'"),
        ({"padding": ((1, 1), (1, 1))}, "unknown padding"),
        ({"feature_group_count": 3}, "feature_group_count = 3 must divide in_features = 4"),
        ({"feature_group_count": 4}, "feature_group_count = 4 must divide .* out_features = 6"),
        ({"feature_group_count": 0}, "feature_group_count must be a positive integer"),
        ({"weight_variance": 0.0}, "weight_variance must be positive"),
        ({"weight_variance": "2"}, "weight_variance must be positive"),
        ({"bias_variance": -0.1}, "bias_variance must be 0 or positive"),
        ({"bias_variance": math.inf}, "bias_variance must be 0 or positive"),
    ],
)
def test_bad_settings(changes, message):
    settings = {"in_features": 4, "out_features": 6, "kernel_size": (3, 3), **changes}
    with pytest.raises(ValueError, match=message):
        ng.Conv(**settings, rngs=rngs(0))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 3), r"takes x of shape \(N, 2 spatial dimensions, 3\), got \(2, 5, 3\)"),
        ((5, 5, 3), "2 spatial dimensions"),
        ((1, 2, 5, 5, 3), "2 spatial dimensions"),
        ((2, 5, 5, 4), r"got \(2, 5, 5, 4\)"),
        ((2, 5, 3, 3), r"covers \(4, 4\) positions does not fit into an image of \(5, 3\)"),
    ],
)
def test_bad_images(shape, message):
    layer = ng.Conv(3, 2, (4, 4), padding="VALID", rngs=rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape))


def test_conv_runs_sample_by_sample():
    layer = ng.Conv(2, 3, (3, 3), strides=2, padding="CIRCULAR", rngs=rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 5, 6, 2))
    alone = jax.vmap(lambda sample: layer(sample[None])[0])(x)
    np.testing.assert_allclose(alone, layer(x), rtol=1e-5, atol=1e-5)
