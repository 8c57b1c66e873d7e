"""The networks that commands train and measure, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx

from natgrad_flax import MLP, ConvNet
from natgrad_flax.arguments.memory import check_bytes
from natgrad_flax.arguments.scalars import check_number
from ntk_analysis.names import find

NETWORKS = ("mlp", "conv-flatten", "conv-average")
"""Fully connected; convolutional, read at every position, or at the mean over positions."""

_LARGEST_EXPONENT = 38  # of float32
_WORDS = {"mlp": "network", "conv-flatten": "ConvNet", "conv-average": "ConvNet with mean pooling"}


def find_network(name: str, dataset: str) -> str:
    """The official name of a network; case and underscores do not matter.

    Args:
      name: as the user wrote it.
      dataset: what it is trained on.

    Raises:
      ValueError: unknown, and the message offers the nearest one; or the data are no images.
    """
    found = find("network", name, NETWORKS)
    if found != "mlp" and dataset == "gaussian":
        raise ValueError(f"{found} takes images, gaussian inputs are none; choose another data set")
    return found


def layout(network: str) -> Literal["flat", "image"]:
    """How ``natgrad_datasets.load`` arranges the inputs of a network."""
    return "flat" if network == "mlp" else "image"


def check_variances(weight_variance: float, bias_variance: float) -> None:
    """Raises ValueError where variances are bad, or float32 cannot hold their squares."""
    check_number("weight_variance", weight_variance, positive=True)
    check_number("bias_variance", bias_variance, positive=False)
    _check_held("weight_variance", weight_variance, power=2)
    _check_held("bias_variance", bias_variance, power=2)


def check_damping_size(name: str, damping: float, num_samples: int = 1) -> None:
    """Raises ValueError where a damping is bad, or float32 cannot hold N times it; 0 is right."""
    check_number(name, damping, positive=False)
    _check_held(name, damping, times=num_samples)


def _check_held(name: str, value: float, *, times: int = 1, power: int = 1) -> None:
    if value and abs(power * math.log10(value) + math.log10(times)) > _LARGEST_EXPONENT:
        factor = f" times {times} samples" if times > 1 else ""
        raise ValueError(
            f"{name} {value!r}{factor} is beyond what float32 can hold; choose one nearer to 1"
        )


def build_network(
    network: str,
    sample_shape: Sequence[int],
    widths: Sequence[int],
    outputs: int,
    *,
    seed: int,
    **options: Any,
) -> MLP | ConvNet:
    """A network in NTK parametrisation.

    A ConvNet has 3 x 3 kernels; its first convolution has stride 1, the others 2.

    Args:
      network: one of ``NETWORKS``.
      sample_shape: (M_0,), or (H, W, C) of an image.
      widths: units of every hidden layer, or channels of every convolution.
      outputs: C.
      seed: of the parameters.
      **options: ``activation``, ``weight_variance`` and ``bias_variance``.

    Raises:
      ValueError: its parameters cannot fit.
    """

    def build() -> MLP | ConvNet:
        rngs = nnx.Rngs(seed)
        if network == "mlp":
            return MLP((*sample_shape, *widths, outputs), **options, rngs=rngs)
        return ConvNet(
            tuple(sample_shape),
            widths,
            outputs,
            strides=(1, *[2] * (len(widths) - 1)),
            pooling=network.removeprefix("conv-"),
            **options,
            rngs=rngs,
        )

    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    check_bytes(
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
        f"a network of hidden widths {', '.join(map(str, widths))} has {count:,} parameters, which "
        "need",
        "choose smaller widths",
    )
    return build()


def network_words(network: str) -> str:
    """A network in a few words."""
    return _WORDS[network]
