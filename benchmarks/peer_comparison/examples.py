"""The networks and batches that both sides get: small ones to compare, large ones to time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.peer_comparison import exchange

SEED = 0


@dataclass(frozen=True)
class Example:
    """A model, its batch and the settings of a step.

    Attributes:
      model: an ``ng.MLP`` or ``ng.ConvNet``, without biases or with ones of variance 1.
      x: inputs (N, ...).
      y: targets (N, C).
      loss: mean squared error, or softmax cross-entropy.
      key: draws the targets of a Monte-Carlo Fisher.
      damping: rho, added to the Fisher in the 1/N convention.
    """

    model: nnx.Module
    x: Array
    y: Array
    loss: ng.Loss
    key: Array
    damping: float


def layers_of(model: nnx.Module) -> list[Any]:
    """The layers of a model in forward order.

    Raises:
      TypeError: another model than ``ng.MLP`` and ``ng.ConvNet``.
    """
    if isinstance(model, ng.MLP):
        return list(model.layers)
    if isinstance(model, ng.ConvNet):
        return [*model.convolutions, model.readout]
    raise TypeError(f"peers get an ng.MLP or ng.ConvNet, not a {type(model).__name__}")


def as_problem(example: Example) -> exchange.Problem:
    """An example as arrays.

    Raises:
      TypeError: another model than ``ng.MLP`` and ``ng.ConvNet``.
      ValueError: a model that peers would have other parameters for.
    """
    model: Any = example.model
    layers = tuple(_as_layer(layer, shape) for layer, shape in _with_shapes(model))
    if model.activation not in exchange.ACTIVATIONS:
        known = ", ".join(exchange.ACTIVATIONS)
        raise ValueError(f"peers get the activations {known}, not {model.activation!r}")
    outputs = model(example.x)
    # r = df l(f, y~) is f - y~ for the squared error and softmax(f) - y~ for the cross-entropy
    entropy = isinstance(example.loss, ng.SoftmaxCrossEntropy)
    means = jax.nn.softmax(outputs) if entropy else outputs
    drawn = means - example.loss.sample(example.key, outputs, 1)[..., 0]
    return exchange.Problem(
        layers,
        model.activation,
        model.pooling if isinstance(model, ng.ConvNet) else "none",
        "cross-entropy" if entropy else "mse",
        np.asarray(example.x),
        np.asarray(example.y),
        np.asarray(drawn.round() if entropy else drawn),
        example.damping,
    )


def _with_shapes(model: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """The layers, each with the height and width of the images that it gets."""
    shape = tuple(model.input_shape[:2]) if isinstance(model, ng.ConvNet) else ()
    found = []
    for layer in layers_of(model):
        found.append((layer, shape))
        if isinstance(layer, ng.Conv):
            shape = layer.positions(shape)
    return found


def _as_layer(layer: Any, shape: tuple[int, ...]) -> exchange.Layer:
    if layer.bias_scale not in (None, 1.0):
        raise ValueError(
            "peers have no factor in front of a bias: use bias_variance=0 or 1, "
            f"not {layer.bias_variance}"
        )
    bias = None if layer.bias is None else np.asarray(layer.bias[...])
    kernel = np.asarray(layer.kernel[...])
    if not isinstance(layer, ng.Conv):
        return exchange.Layer(kernel, bias, layer.weight_scale)
    plain = layer.feature_group_count == 1 and max(layer.kernel_dilation) == 1
    if layer.padding == "CIRCULAR" or not plain:
        raise ValueError("peers get convolutions with zeros around, one group and no dilation")
    return exchange.Layer(
        kernel, bias, layer.weight_scale, tuple(layer.strides), layer.border(shape)
    )


def _example(model: nnx.Module, samples: int, loss: ng.Loss, damping: float, dtype: Any) -> Example:
    """A model with Gaussian inputs and random targets, the same numbers at every call."""
    inputs, labels, draws = jax.random.split(jax.random.key(SEED), 3)
    shape = model.input_shape if isinstance(model, ng.ConvNet) else model.widths[:1]  # type: ignore[attr-defined]
    x = jax.random.normal(inputs, (samples, *shape), dtype)
    outputs = layers_of(model)[-1].out_features
    if isinstance(loss, ng.SoftmaxCrossEntropy):
        classes = jax.random.randint(labels, (samples,), 0, outputs)
        y = jax.nn.one_hot(classes, outputs, dtype=dtype)
    else:
        y = jax.random.normal(labels, (samples, outputs), dtype)
    return Example(model, x, y, loss, draws, damping)


def _small(model: Callable[..., nnx.Module], loss: ng.Loss) -> Example:
    """With biases, in the dtype of the surrounding scope: matrices of its P parameters fit."""
    dtype = jnp.result_type(float)
    built = model(
        activation="tanh", weight_variance=2.0, bias_variance=1.0, param_dtype=dtype,
        rngs=nnx.Rngs(SEED),
    )  # fmt: skip
    return _example(built, 9, loss, 0.03, dtype)


def _large(model: Callable[..., nnx.Module], samples: int = 128) -> Example:
    """Without biases, in float32, cross-entropy."""
    built = model(weight_variance=2.0, param_dtype=jnp.float32, rngs=nnx.Rngs(SEED))
    return _example(built, samples, ng.SoftmaxCrossEntropy(), 1e-3, jnp.float32)


_CLASSIFIER = partial(ng.MLP, (5, 6, 4, 3))
_IMAGES = partial(ng.ConvNet, (6, 6, 2), (3, 4), 3, strides=(1, 2))

SMALL: Mapping[str, Callable[[], Example]] = {
    "MLP, cross-entropy": lambda: _small(_CLASSIFIER, ng.SoftmaxCrossEntropy()),
    "MLP, MSE": lambda: _small(_CLASSIFIER, ng.MeanSquaredError()),
    "ConvNet, cross-entropy": lambda: _small(_IMAGES, ng.SoftmaxCrossEntropy()),
    "ConvNet, MSE": lambda: _small(partial(_IMAGES, pooling="average"), ng.MeanSquaredError()),
}
"""Networks whose matrices are compared, in float64 inside ``jax.enable_x64``.

The first ConvNet flattens its images, the second averages over their positions.
"""

LARGE: Mapping[str, Callable[[], Example]] = {
    "MLP 784-256-10": lambda: _large(partial(ng.MLP, (784, 256, 10))),
    "MLP 784-1024-1024-10": lambda: _large(partial(ng.MLP, (784, 1024, 1024, 10))),
    "ConvNet": lambda: _large(ng.ConvNet),
    "ConvNet, average": lambda: _large(partial(ng.ConvNet, pooling="average")),
    "ConvNet 16x16, N=32": lambda: _large(partial(ng.ConvNet, (16, 16, 3)), 32),
}
"""Networks whose K-FAC steps are timed, on 128 samples; the smallest ConvNet on 32.

The ConvNets are for images as large as CIFAR-10's, the last for those of a quarter. A readout of
flattened images has a factor of side 8192 (2048 there), one of averages a factor of side 128.
"""

SLOW: Mapping[str, Mapping[str, str]] = {
    "kfac-jax": dict.fromkeys(
        ("ConvNet", "ConvNet, average"),
        "kfac-jax makes the input factors of convolutions by convolutions with whole images as "
        "kernels inside of a loop, where XLA's CPU has no fast ones: a step takes the better part "
        "of a minute; ConvNet 16x16, N=32 stands for it",
    )
}
"""By peer: large networks that are timed only where they are asked for by name, and why."""
