"""Models of several heads: a loss for each of several outputs, and their weighted sum.

The loss is sum_h c_h L_h, each L_h a mean over its own samples, positions and weights. Given the
outputs, targets of different heads are independent, so the output Fisher is block-diagonal over the
heads with the blocks c_h H_h, and R with the blocks sqrt(c_h) R_h. To all that follows, a sample
has one row of outputs, those of all heads and of all their positions side by side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.scalars import check_number
from natgrad_flax.losses.base import Loss

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, init=False)
class Heads:
    """A loss for each head of a model that returns a dictionary or a tuple of outputs.

    Targets have the structure of the outputs. So have weights of samples or positions, with None
    for a head whose samples all count the same; one array (N,) is that of all heads. K-FAC and
    EKFAC count the inputs of a layer by the mean weight of a sample over its heads and positions.

    Args:
      losses: one a head: a dictionary with the keys of the outputs, or a tuple.
      weights: c_h, positive numbers of the same structure; None for 1.

    Raises:
      TypeError: no dictionary or tuple of losses.
      ValueError: no heads, or weights that are not one positive number a head.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> losses = {"class": ng.SoftmaxCrossEntropy(), "box": ng.MeanSquaredError()}
      >>> loss = ng.Heads(losses, weights={"class": 1.0, "box": 0.5})
      >>> outputs = {"class": jnp.zeros((2, 3)), "box": jnp.ones((2, 4))}
      >>> targets = {"class": jnp.array([0, 2]), "box": jnp.zeros((2, 4))}
      >>> bool(jnp.isclose(loss(outputs, targets), jnp.log(3) + 0.5 * 2))
      True
    """

    keys: tuple[str | int, ...]
    losses: tuple[Loss, ...]
    weights: tuple[float, ...]
    shapes: tuple[Shape, ...] | None
    """Of the outputs of a sample, by head, where the model is known."""

    def __init__(
        self,
        losses: Mapping[str, Loss] | Sequence[Loss],
        weights: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        if not isinstance(losses, (Mapping, tuple, list)) or not losses:
            raise TypeError(
                "ng.Heads needs a dictionary of losses by the keys of the model's outputs, or a "
                f"tuple of them, got {losses!r:.60}"
            )
        named = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
        for key, loss in named.items():
            if not isinstance(loss, Loss):
                raise TypeError(
                    f"the loss of head {key!r} must be an instance, such as ng.MeanSquaredError(), "
                    f"got {loss!r:.60}"
                )
        self._set(keys=tuple(named), losses=tuple(named.values()), shapes=None)
        given = self.ordered(weights, "the weights of ng.Heads") if weights is not None else None
        checked = (
            check_number(f"the weight of head {key!r}", weight, positive=True)
            for key, weight in zip(named, given or (1.0,) * len(named), strict=True)
        )
        self._set(weights=tuple(checked))

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def in_span(self) -> bool:
        """Whether the residual lies in the span of the columns of R."""
        return all(loss.in_span for loss in self.losses)

    @property
    def needs_targets(self) -> bool:
        """Whether the Fisher of a head is made of targets."""
        return any(loss.needs_targets for loss in self.losses)

    def ordered(self, value: Any, name: str) -> tuple[Any, ...]:
        """What was given for each head, in their order.

        Raises:
          TypeError: no dictionary, or no tuple where the losses are one.
          ValueError: something for other heads than those of the losses.
        """
        kind = "tuple" if self.keys[0] == 0 else "dictionary"
        if not isinstance(value, (tuple, list) if kind == "tuple" else Mapping):
            raise TypeError(
                f"{name} must be a {kind} with one for each of the heads {self._heads}, as the "
                f"losses are, got a {type(value).__name__}"
            )
        found = value if isinstance(value, Mapping) else dict(enumerate(value))
        missing = [key for key in self.keys if key not in found]
        more = [key for key in found if key not in self.keys]
        if missing or more:
            what = ", ".join(
                [f"nothing for {key!r}" for key in missing] + [f"{key!r} besides" for key in more]
            )
            raise ValueError(
                f"{name} must have one for each of the heads {self._heads} of the losses, but has "
                f"{what}"
            )
        return tuple(found[key] for key in self.keys)

    @property
    def _heads(self) -> str:
        return ", ".join(map(repr, self.keys))

    def bound(self, outputs: Any, samples: int) -> Heads:
        """With the shapes of a model's outputs.

        Args:
          outputs: by head, arrays (N, ..., C) or their shapes.
          samples: N.

        Raises:
          TypeError, ValueError: other heads, or an output that is none (N, ..., C).
        """
        arrays = self.ordered(outputs, "the outputs of the model")
        for key, array in zip(self.keys, arrays, strict=True):
            shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
            if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                what = type(array).__name__ if dtype is None else dtype
                raise TypeError(f"the output of head {key!r} must be floating, got {what}")
            if len(shape) < 2 or shape[0] != samples:
                raise ValueError(
                    f"the output of head {key!r} must have shape (N, ..., C) with N = "
                    f"{samples}, got {shape}; one output a sample becomes f[:, None]"
                )
        found = copy.copy(self)
        found._set(shapes=tuple(array.shape[1:] for array in arrays))
        return found

    def joined(self, outputs: Any) -> Array:
        """The outputs of all heads side by side, shape (N, C)."""
        arrays = self.ordered(outputs, "the outputs of the model")
        return jnp.concatenate([jnp.reshape(array, (len(array), -1)) for array in arrays], axis=1)

    def split(self, outputs: Any) -> tuple[Array, ...]:
        """The outputs of each head, from what the model returns or from ``joined``."""
        if not isinstance(outputs, Array):
            return self.ordered(outputs, "the outputs")
        assert self.shapes is not None
        ends = [sum(map(math.prod, self.shapes[: i + 1])) for i in range(len(self.shapes))]
        parts = jnp.split(outputs, ends[:-1], axis=1)
        return tuple(
            part.reshape(len(part), *shape) for part, shape in zip(parts, self.shapes, strict=True)
        )

    def __call__(self, outputs: Any, targets: Any, weights: Any = None) -> Array:
        """sum_h c_h L_h, a scalar.

        Args:
          outputs: by head, arrays (N, ..., C).
          targets: by head, as the loss of the head takes them.
          weights: by head, None for a plain mean; or one array for all.
        """
        y, w = (
            tree if isinstance(tree, tuple) else self._given(tree, name)
            for tree, name in ((targets, "the targets"), (weights, "the weights"))
        )
        parts = zip(self.weights, self.losses, self.split(outputs), y, w, strict=True)
        values = [c * loss(f, target, weight) for c, loss, f, target, weight in parts]
        return sum(values[1:], start=values[0])

    def _given(self, value: Any, name: str) -> tuple[Any, ...]:
        if value is None or hasattr(value, "shape"):
            return (value,) * len(self.keys)
        return self.ordered(value, name)

    def given_weights(self, value: Any, name: str) -> tuple[Any, ...]:
        """Weights of samples by head.

        Raises:
          TypeError, ValueError: as ``ordered``; one array with an axis of positions.
        """
        if getattr(value, "ndim", 1) != 1:
            raise ValueError(
                f"{name} for all heads must have shape (N,), got {value.shape}; weights of "
                "positions are given by head"
            )
        return self._given(value, name)
