"""Data and models that several workloads share, made from their settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import natgrad_datasets
import numpy as np
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard.workload import Data


def images(settings: Mapping[str, Any]) -> Data:
    """Standardised images of a data set, all of one norm, with their encoded labels.

    Args:
      settings: "dataset", "classes", "num_train" and "num_held_out"; the first samples of the
        chosen classes in file order, held-out ones from the test set. "input_norm" is the
        Euclidean norm of every image. "layout" is "flat", unless it is given as "image".

    Returns:
      Targets are +-0.5 in one column for two classes, else one-hot.
    """
    chosen = (settings[name] for name in ("dataset", "classes", "num_train", "num_held_out"))
    name, classes, train, held_out = chosen
    layout = settings.get("layout", "flat")
    data = _images(name, tuple(classes), train, held_out, True, layout)
    norm = np.float32(settings["input_norm"])
    return data._replace(x_train=norm * data.x_train, x_held_out=norm * data.x_held_out)


def reconstruction(settings: Mapping[str, Any]) -> Data:
    """Images with pixels in [0, 1] that are their own targets.

    Args:
      settings: "dataset", "num_train" and "num_held_out".
    """
    classes = tuple(range(10))
    counts = settings["num_train"], settings["num_held_out"]
    x, _, x_held_out, _ = _images(settings["dataset"], classes, *counts, False)
    return Data(x, x, x_held_out, x_held_out)


@cache
def _images(
    name: str,
    classes: tuple[int, ...],
    num_train: int,
    num_held_out: int,
    prepare: bool,
    layout: Literal["flat", "image"] = "flat",
) -> Data:
    loaded = natgrad_datasets.load(
        name,
        classes=classes,
        num_train=num_train,
        num_test=num_held_out,
        layout=layout,
        prepare=prepare,
        dtype="float32",
    )
    arrays = (loaded.x_train, loaded.y_train, loaded.x_test, loaded.y_test)
    return Data(*(np.asarray(array, np.float32) for array in arrays))


def mlp(settings: Mapping[str, Any], seed: int) -> nnx.Module:
    """A fully connected network in NTK parametrisation, in float32.

    Args:
      settings: "widths", "activation", "weight_variance" and "bias_variance" of ``ng.MLP``.
      seed: of the initial parameters.
    """
    return ng.MLP(
        settings["widths"],
        activation=settings["activation"],
        weight_variance=settings["weight_variance"],
        bias_variance=settings["bias_variance"],
        rngs=nnx.Rngs(seed),
    )


def conv_net(settings: Mapping[str, Any], seed: int) -> nnx.Module:
    """A convolutional network in NTK parametrisation, in float32.

    Args:
      settings: "input_shape", "channels", "outputs", "strides", "pooling", "weight_variance" and
        "bias_variance" of ``ng.ConvNet``.
      seed: of the initial parameters.
    """
    names = ("strides", "pooling", "weight_variance", "bias_variance")
    return ng.ConvNet(
        settings["input_shape"],
        settings["channels"],
        settings["outputs"],
        **{name: settings[name] for name in names},
        rngs=nnx.Rngs(seed),
    )
