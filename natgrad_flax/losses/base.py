"""Losses, and the Fisher information of the output distributions that they stand for.

A loss is the mean over samples of a negative log-likelihood l(f_n, y_n). Its residual is
r_n = dl/df_n, so the gradient of the loss is J^T r / N, and its output Fisher is
H_n = E_y[r_n r_n^T] = R_n R_n^T over targets drawn from the model.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

IntegerTargets = Literal["refused", "labels", "values", "any"]
"""What integers are to a loss: nothing, the numbers of classes, numbers like all others, or what
a function of the user's makes of them."""


@dataclass(frozen=True)
class Loss(abc.ABC):
    """A loss with its output Fisher information.

    Methods take outputs (N, C), and targets (N, C) unless a loss says otherwise; calling it takes
    outputs (N, ..., C) with positions and weights, too.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> loss = ng.MeanSquaredError()
      >>> f, y = jnp.array([[1.0], [2.0], [9.0]]), jnp.zeros((3, 1))
      >>> isinstance(loss, ng.Loss)
      True
      >>> # a mask: (1 + 4) / (2 * 2)
      >>> float(loss(f, y, weights=jnp.array([1.0, 1.0, 0.0])))
      1.25
    """

    integer_targets: ClassVar[IntegerTargets] = "refused"
    needs_targets: ClassVar[bool] = False
    """Whether ``fisher`` and ``factor`` take the targets as their second argument."""
    in_span: ClassVar[bool] = True
    """Whether the residual lies in the span of the columns of R."""

    def __call__(self, outputs: Array, targets: Array, weights: Array | None = None) -> Array:
        """The loss, a scalar: sum w l / sum w over samples and positions.

        Args:
          outputs: f, shape (N, ..., C).
          targets: (N, ..., C), or class numbers (N, ...) where the loss takes them.
          weights: w, shape (N,) or (N, ...), for instance a mask; None for the plain mean. Where
            all are 0 so is the loss.
        """
        if outputs.ndim == 2 and weights is None:
            return self.mean(outputs, targets)
        places = outputs.shape[:-1]
        rows = outputs.reshape(-1, outputs.shape[-1])
        values = self.values(rows, targets.reshape(-1, *targets.shape[len(places) :]))
        values = values.reshape(places)
        if weights is None:
            return jnp.mean(values)
        w = jnp.asarray(weights, values.dtype)
        w = jnp.broadcast_to(w.reshape(*w.shape, *[1] * (len(places) - w.ndim)), places)
        # what is masked may be infinite
        total = jnp.sum(w)
        return jnp.sum(w * jnp.where(w > 0, values, 0)) / jnp.where(total > 0, total, 1)

    @abc.abstractmethod
    def values(self, outputs: Array, targets: Array) -> Array:
        """l of every sample, shape (N,)."""

    def mean(self, outputs: Array, targets: Array) -> Array:
        """The mean over samples, a scalar."""
        return jnp.mean(self.values(outputs, targets))

    @abc.abstractmethod
    def residual(self, outputs: Array, targets: Array) -> Array:
        """r = dl_n/df_n, shape (N, C); the loss gradient is J^T r / N."""

    @abc.abstractmethod
    def fisher(self, outputs: Array) -> Array:
        """The output Fisher H, shape (N, C, C)."""

    @abc.abstractmethod
    def factor(self, outputs: Array) -> Array:
        """R of full column rank S with H = R R^T, shape (N, C, S)."""

    @abc.abstractmethod
    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """w with R w = r, shape (N, S)."""

    def fisher_product(self, outputs: Array, vectors: Array, targets: Array | None = None) -> Array:
        """H v of every sample for its v, shape (N, C)."""
        given = (outputs, targets) if self.needs_targets else (outputs,)
        factor = self.factor(*given)
        return jnp.einsum("ncs,ns->nc", factor, jnp.einsum("ncs,nc->ns", factor, vectors))

    def columns_in_range(self, outputs: Array) -> Array | None:
        """Which columns of R are not zero to rounding beside the largest of the batch, (N, S).

        The others count as zero at zero damping, where a pseudo-inverse would divide by them. None
        where all are in range whatever the outputs.
        """
        return None

    @abc.abstractmethod
    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Residuals of targets drawn from the model, shape (N, C, num_samples).

        They are divided by sqrt(num_samples), so that their outer products sum to an unbiased
        estimate of H.
        """

    @abc.abstractmethod
    def check_targets(self, targets: np.ndarray) -> None:
        """Raises ValueError where concrete targets of shape (N, C) are not of the right form."""

    def check_curvature(self, outputs: Array, targets: Array) -> None:
        """Raises ValueError where H of concrete outputs is not positive semi-definite."""
        del outputs, targets

    def target_shape(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of targets that are not class numbers, from that of the outputs."""
        return outputs


@dataclass(frozen=True)
class DiagonalLoss(Loss):
    """A loss whose output Fisher is diagonal, so that R is its square root."""

    @abc.abstractmethod
    def curvature(self, outputs: Array) -> Array:
        """The diagonal of H, shape (N, C)."""

    def root(self, outputs: Array) -> Array:
        """The diagonal of R, shape (N, C).

        It is kept so far from 0 that its inverse, and the quotient of that by a damping, stay
        finite; what that adds to H is far below rounding.
        """
        h = self.curvature(outputs)
        return jnp.sqrt(jnp.maximum(h, float(jnp.finfo(h.dtype).tiny) ** 0.5))

    def fisher(self, outputs: Array) -> Array:
        """H, shape (N, C, C)."""
        return diagonal_matrices(self.curvature(outputs))

    def factor(self, outputs: Array) -> Array:
        """R, shape (N, C, C)."""
        return diagonal_matrices(self.root(outputs))

    def fisher_product(self, outputs: Array, vectors: Array, targets: Array | None = None) -> Array:
        """H v, shape (N, C)."""
        return self.curvature(outputs) * vectors

    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """r over the root, shape (N, C)."""
        return self.residual(outputs, targets) / self.root(outputs)

    def columns_in_range(self, outputs: Array) -> Array | None:
        """Outputs whose entry of H is above eps times the largest."""
        h = self.curvature(outputs)
        return h > jnp.finfo(h.dtype).eps * jnp.max(h)


def drawn(draw: Callable[..., Array], key: Array, shape: tuple[int, ...], *settings: Any) -> Array:
    """The numbers of ``draw(key, shape, ...)``, drawn along one axis.

    XLA's CPU compiler unrolls a short last axis, such as that of 10 classes, with the random
    generator in it: half a second for every program that draws.
    """
    return draw(key, (math.prod(shape),), *settings).reshape(shape)


def diagonal_matrices(diagonal: Array) -> Array:
    """Matrices (N, C, C) from their diagonals (N, C)."""
    return diagonal[:, :, None] * jnp.eye(diagonal.shape[1], dtype=diagonal.dtype)
