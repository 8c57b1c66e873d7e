"""Targets, class numbers and weights as callers give them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import as_array, check_finite, check_real, is_concrete
from natgrad_flax.losses.base import Loss


def are_labels(loss: Loss, targets: Array) -> bool:
    """Whether targets are class numbers."""
    return loss.integer_targets == "labels" and jnp.issubdtype(targets.dtype, jnp.integer)


def check_targets(loss: Loss, value: Any, samples: int, name: str = "y") -> Array:
    """Targets as an array, after every check that needs neither the model nor weights.

    Args:
      loss: what they are for.
      value: what was given.
      samples: N.
      name: of the argument.

    Raises:
      ValueError: a shape without an axis of N samples.
      TypeError: no numbers, or integers for a loss that takes none.
    """
    targets = as_array(value, name)
    kind, real = loss.integer_targets, jnp.issubdtype(targets.dtype, jnp.floating)
    labels = are_labels(loss, targets)
    least = 1 if labels or kind == "any" else 2
    if targets.ndim < least or targets.shape[0] != samples:
        hint = "a vector of targets becomes y[:, None]"
        if kind == "labels":
            hint = "class numbers have an integer dtype and the shape (N, ...)"
        elif kind == "refused":
            hint = (
                "class numbers become targets by one-hot encoding, or are for "
                "ng.SoftmaxCrossEntropy(), a vector of targets becomes y[:, None]"
            )
        raise ValueError(
            f"{name} must have shape (N, C), or (N, ..., C) for outputs with positions, and "
            f"N = {samples}, got {targets.shape}; {hint}"
        )
    if not (real or labels or kind == "any") and (kind != "values" or jnp.iscomplexobj(targets)):
        raise TypeError(
            f"{name} must be floating targets of shape (N, C), got dtype {targets.dtype}; class "
            "numbers become targets by jax.nn.one_hot"
            + (", or are integers of shape (N,)" if kind == "labels" else "")
        )
    return targets


def check_weights(value: Any, samples: int, name: str = "weights") -> Array:
    """Weights as a floating array (N, ...), after every check that needs no outputs.

    Raises:
      ValueError: a shape without an axis of N samples, NaN, negative weights, or none but zeros.
      TypeError: no real numbers.
    """
    weights = as_array(value, name)
    check_real(weights, name)
    if not weights.ndim or weights.shape[0] != samples:
        raise ValueError(
            f"{name} must have shape (N,), or (N, ...) with one for every position of the outputs, "
            f"with N = {samples}, got {weights.shape}"
        )
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        weights = weights.astype(jnp.result_type(float))
    check_finite(weights, name)
    if is_concrete(weights):
        values = np.asarray(weights)
        if values.min() < 0:
            first = tuple(map(int, np.argwhere(values < 0)[0]))
            raise ValueError(
                f"{name} must be 0 or positive, but {(values < 0).sum()} are negative, "
                f"{values[first]:g} at {first} for one"
            )
        # one process of several may have nothing but padding
        if not values.any() and jax.process_count() == 1:
            raise ValueError(f"{name} are all 0 and leave nothing to learn from")
    return weights


def check_values(loss: Loss, targets: Array, weights: Array | None, name: str = "y") -> None:
    """Looks at concrete targets that count, those whose weight is not 0.

    Raises:
      ValueError: NaN or infinity, or what the loss does not take.
    """
    if not is_concrete(targets) or not (weights is None or is_concrete(weights)):
        return
    counted: Any = targets
    if weights is not None and weights.shape == targets.shape[: weights.ndim]:
        counted = np.asarray(targets)[np.asarray(weights) > 0]
    check_finite(counted, name)
    if counted.size:
        loss.check_targets(np.asarray(counted))


def check_labels(
    loss: Loss, targets: Array, weights: Array | None, classes: int, name: str = "y"
) -> None:
    """Refuses concrete class numbers that are none of the model's.

    Raises:
      ValueError: a number below 0, or of no output, where the weight is not 0.
    """
    known = is_concrete(targets) and (weights is None or is_concrete(weights))
    if not known or not are_labels(loss, targets):
        return
    labels = np.asarray(targets)
    bad = (labels < 0) | (labels >= classes)
    if weights is not None:
        counts = np.asarray(weights) > 0
        bad &= counts.reshape(*counts.shape, *[1] * (bad.ndim - counts.ndim))
    if bad.any():
        first = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(
            f"{name} has {bad.sum()} class numbers that are none of the model's {classes} outputs, "
            f"{labels[first]} at {first} for one: they count from 0 to {classes - 1}; what is to "
            "be ignored gets the weight 0"
        )


def check_shape(loss: Loss, targets: Array, outputs: tuple[int, ...], said: str) -> None:
    """Refuses targets whose shape does not fit that of the outputs.

    Args:
      loss: what they are for.
      targets: the targets.
      outputs: the shape (N, ..., C).
      said: about the model, for the message.

    Raises:
      ValueError: they do not fit.
    """
    places, shape = outputs[:-1], targets.shape
    if loss.integer_targets == "any":
        if shape[: len(places)] != places:
            raise ValueError(
                f"{said}, but y has shape {shape}; it must have one target for each of {places}"
            )
        return
    labels = are_labels(loss, targets)
    wanted = places if labels else loss.target_shape(outputs)
    if shape == wanted:
        return
    more = ""
    if labels:
        more = f"; class numbers must have shape {wanted}, one-hot rows a floating dtype"
    elif wanted != outputs:
        more = f"; it must have shape {wanted}"
    raise ValueError(f"{said}, but y has shape {shape}{more}")


def fitted(loss: Loss, targets: Array, outputs: Array) -> Array:
    """Targets in the form and the dtype in which a loss takes them beside outputs (N, ..., C).

    Raises:
      ValueError: their shape does not fit that of the outputs.
    """
    check_shape(loss, targets, outputs.shape, f"the model returns {outputs.shape}")
    integers = not jnp.issubdtype(targets.dtype, jnp.floating)
    if integers and loss.integer_targets in ("labels", "any"):
        return targets
    return targets.astype(outputs.dtype)


def relative(weights: Array | None) -> Array | None:
    """Weights of a whole batch over their mean, in the widest precision that is switched on.

    Zeros stay zeros, so that a batch of padding alone, which cannot be seen inside of ``jit``, has
    a gradient of 0.
    """
    if weights is None:
        return None
    weights = weights.astype(jnp.result_type(float))
    mean = jnp.mean(weights)
    return weights / jnp.where(mean > 0, mean, 1)
