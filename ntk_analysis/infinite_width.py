"""From a finite network to its infinite-width limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from flax import nnx

from natgrad_flax import MLP, ConvNet
from natgrad_flax.models.layers import Conv, Dense
from ntk_analysis._neural_tangents import stax
from ntk_analysis.activation_kernels import ACTIVATION_KERNELS, HERMITE_TERMS
from ntk_analysis.engines import (
    Activate,
    Engine,
    activation_through,
    chosen_engine,
    stax_activation,
)
from ntk_analysis.patches import Patches

Affine = tuple[int, float, float]
"""Units, weight variance and bias variance of a layer."""


@dataclass(frozen=True, eq=False)
class InfiniteWidthLimit:
    """A fully connected network as its width goes to infinity.

    Attributes:
      widths: M_1, ..., M_L of the model, which no kernel depends on.
      activation: what acts on covariances at every hidden layer.
      negative_slope: phi(u) / u below 0 of an activation that is u above, else None.
      description: all that decides the kernels, in a form that JSON can hold; widths do not.

    Example:
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), activation="leaky_relu", rngs=nnx.Rngs(0))
      >>> limit = na.infinite_width_limit(model)
      >>> limit.widths, limit.negative_slope
      ((8, 1), 0.01)
    """

    widths: tuple[int, ...]
    activation: Activate
    negative_slope: float | None
    description: dict[str, Any]

    @property
    def depth(self) -> int:
        """L."""
        return len(self.widths)

    @cached_property
    def network(self) -> tuple[Any, Any, Any]:
        """(init_fn, apply_fn, kernel_fn) of neural-tangents, as of ``stax.serial``.

        With the widths of the model and its parametrisation.

        Raises:
          ImportError: neural-tangents is not installed.
        """
        activation = stax_activation(self.description["activation"])
        blocks = [
            block
            for width, *variances in zip(self.widths, *_variances(self.description), strict=True)
            for block in (activation, stax().Dense(width, **_scales(*variances)))
        ]
        return stax().serial(*blocks[1:])


@dataclass(frozen=True, eq=False)
class ConvolutionalLimit:
    """A convolutional network as the number of its channels goes to infinity.

    Attributes:
      widths: channels of the convolutions, and the number of outputs.
      paddings: of the convolutions.
      patches: what every convolution reads, L - 1 in number.
      activation: what acts on covariances behind each of them.
      pooled: whether the readout sees the mean over positions; else it sees every position.
      diagonal_derivative: E[phi'(u)^2] of an activation with a kink, else None.
      description: all that decides the kernels, in a form that JSON can hold; channels do not.
    """

    widths: tuple[int, ...]
    paddings: tuple[str, ...]
    patches: tuple[Patches, ...]
    activation: Activate
    pooled: bool
    diagonal_derivative: float | None
    description: dict[str, Any]

    @property
    def depth(self) -> int:
        """L, the readout counted."""
        return len(self.patches) + 1

    @cached_property
    def network(self) -> tuple[Any, Any, Any]:
        """(init_fn, apply_fn, kernel_fn) of neural-tangents, as of ``InfiniteWidthLimit``."""
        activation = stax_activation(self.description["activation"])
        *scales, last = [_scales(*pair) for pair in zip(*_variances(self.description), strict=True)]
        layers = zip(self.widths, self.patches, self.paddings, scales, strict=False)
        blocks = [
            block
            for channels, patches, padding, scale in layers
            for block in (
                stax().Conv(channels, patches.kernel_size, patches.strides, padding, **scale),
                activation,
            )
        ]
        blocks.append(stax().GlobalAvgPool() if self.pooled else stax().Flatten())
        return stax().serial(*blocks, stax().Dense(self.widths[-1], **last))

    def covariances(self) -> list[int]:
        """Covariances that two samples have at the input and behind every convolution, L numbers.

        A mean over positions needs those between all pairs of them, the square of their number; a
        readout of every position needs those of a position with itself only.
        """
        shapes = [self.patches[0].shape, *(patches.positions for patches in self.patches)]
        return [math.prod(shape) ** (2 if self.pooled else 1) for shape in shapes]


Limit = InfiniteWidthLimit | ConvolutionalLimit


def infinite_width_limit(model: nnx.Module, engine: Engine = "auto") -> Limit:
    """The infinite-width limit of a network in NTK parametrisation.

    Depth, activation, variances and biases are the model's, and in a ``ng.ConvNet`` images,
    kernels, strides, padding and pooling; its parameters and hidden widths do not matter. Closed
    forms for relu, leaky_relu, erf, gelu and identity. For tanh the kernel is a
    Hermite series of 256 terms, which is exact to rounding for pre-activations of correlation up
    to 0.9. Between nearly equal inputs all terms count: the relative error of E[phi' phi'] on the
    diagonal is 3e-13 for variance 2, 4e-9 for 4 and 2e-3 for 25.

    Args:
      model: an ``ng.MLP`` or an ``ng.ConvNet``.
      engine: what works out the activations: "neural-tangents", "natgrad" (our own formulas, equal
        to 1e-12), or "auto": neural-tangents where it is installed. Activations of a fully
        connected network that are linear on both sides of 0 always go in angles.

    Raises:
      TypeError: the model is neither, so that its limit would have to be worked out by hand.
      ValueError: a layer of it was changed so that it has no limit; the message names the layer. Or
        an unknown engine.
      ImportError: the engine is not installed.

    Example:
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> limit = na.infinite_width_limit(
      ...     ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), engine="natgrad"
      ... )
      >>> limit.description["activation"]
      'relu'
    """
    chosen = chosen_engine(engine)
    network = require_limit(model)
    if network.activation not in ACTIVATION_KERNELS:
        raise ValueError(
            f"layer 1: activation {network.activation!r} has no infinite-width kernel here; those "
            f'with one are {", ".join(ACTIVATION_KERNELS)}; or use kernels="empirical"'
        )
    if isinstance(network, MLP):
        layers = tuple(_affine(layer, i) for i, layer in enumerate(network.layers, 1))
        return _make_limit(network.activation, chosen, layers)
    shape: tuple[int, ...] = network.input_shape[:2]
    convolutions = []
    for index, layer in enumerate(network.convolutions, 1):
        convolutions.append((_convolution(layer, index), Patches.of(layer, shape), layer.padding))
        shape = layer.positions(shape)
    readout = _affine(network.readout, len(convolutions) + 1)
    return _make_convolutional_limit(
        network.activation, chosen, tuple(convolutions), network.pooling == "average", readout
    )


def require_limit(model: nnx.Module) -> MLP | ConvNet:
    """The model, which must be one whose infinite-width limit is known.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(model, (MLP, ConvNet)):
        raise TypeError(
            f"{type(model).__name__} has no infinite-width limit: analytic kernels are known for "
            'ng.MLP and ng.ConvNet, any depth; use kernels="empirical" for other models'
        )
    return model


def sample_shape(model: MLP | ConvNet) -> tuple[int, ...]:
    """The shape of one sample: (M_0,), or (H, W, C) of an image."""
    return model.widths[:1] if isinstance(model, MLP) else model.input_shape


def num_outputs(model: MLP | ConvNet) -> int:
    """C."""
    return model.widths[-1] if isinstance(model, MLP) else model.outputs


def _affine(layer: nnx.Module, index: int) -> Affine:
    if not isinstance(layer, Dense) or layer.init_power is not None:
        raise ValueError(
            f"layer {index} ({type(layer).__name__}) has no infinite-width limit: it is not "
            "an ng.Dense in NTK parametrisation"
        )
    return layer.out_features, layer.weight_variance, layer.bias_variance


def _convolution(layer: nnx.Module, index: int) -> Affine:
    if not isinstance(layer, Conv) or layer.init_power is not None:
        raise ValueError(
            f"layer {index} ({type(layer).__name__}) has no infinite-width limit: it is not "
            "an ng.Conv in NTK parametrisation"
        )
    if layer.feature_group_count != 1 or set(layer.kernel_dilation) != {1}:
        raise ValueError(
            f"layer {index} (Conv) has no infinite-width limit: stax.Conv of neural-tangents has "
            "neither groups nor dilation"
        )
    return layer.out_features, layer.weight_variance, layer.bias_variance


def _scales(weight_variance: float, bias_variance: float) -> dict[str, float | None]:
    """The arguments of a stax layer; a bias of None is no bias."""
    bias_scale = bias_variance**0.5 if bias_variance > 0 else None
    return {"W_std": weight_variance**0.5, "b_std": bias_scale}


def _variances(description: dict[str, Any]) -> tuple[list[float], list[float]]:
    """sigma_w^2 and sigma_b^2 of all layers."""
    return description["weight_variances"], description["bias_variances"]


def _describe(name: str, engine: str, layers: tuple[Affine, ...]) -> dict[str, Any]:
    return {
        "activation": name,
        "engine": engine,
        "hermite_terms": HERMITE_TERMS if ACTIVATION_KERNELS[name].series else None,
        "weight_variances": [weight for _, weight, _ in layers],
        "bias_variances": [bias for _, _, bias in layers],
    }


@cache
def _make_limit(name: str, engine: str, layers: tuple[Affine, ...]) -> InfiniteWidthLimit:
    return InfiniteWidthLimit(
        widths=tuple(width for width, _, _ in layers),
        activation=activation_through(name, engine),
        negative_slope=ACTIVATION_KERNELS[name].negative_slope,
        description=_describe(name, engine, layers),
    )


@cache
def _make_convolutional_limit(
    name: str,
    engine: str,
    convolutions: tuple[tuple[Affine, Patches, str], ...],
    pooled: bool,
    readout: Affine,
) -> ConvolutionalLimit:
    """A convolution is what it is made with, what it reads, and its padding."""
    layers = (*(layer for layer, _, _ in convolutions), readout)
    return ConvolutionalLimit(
        widths=tuple(width for width, _, _ in layers),
        paddings=tuple(padding for _, _, padding in convolutions),
        patches=tuple(patches for _, patches, _ in convolutions),
        activation=activation_through(name, engine),
        pooled=pooled,
        diagonal_derivative=ACTIVATION_KERNELS[name].diagonal_derivative,
        description=_describe(name, engine, layers)
        | {
            "convolutions": [patches.describe() for _, patches, _ in convolutions],
            "pooled": pooled,
        },
    )
