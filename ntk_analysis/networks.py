"""The networks that commands train and measure, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx

from natgrad_flax import MLP, ConvNet
from natgrad_flax.memory import check_bytes
from ntk_analysis.names import find

NETWORKS = ("mlp", "conv-flatten", "conv-average")
"""Fully connected; convolutional, read at every position, or at the mean over positions."""

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
