"""Losses, and the Fisher information of the output distributions that they stand for.

A loss is the mean over samples of a negative log-likelihood l(f_n, y_n). Its residual is
r_n = dl/df_n, so the gradient of the loss is J^T r / N, and its output Fisher is
H_n = E_y[r_n r_n^T] = R_n R_n^T over targets drawn from the model.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Loss(abc.ABC):
    """A loss with its output Fisher information; outputs and targets have the shape (N, C)."""

    @abc.abstractmethod
    def __call__(self, outputs: Array, targets: Array) -> Array:
        """The loss, a scalar: the mean over samples."""

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

    @abc.abstractmethod
    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Residuals of targets drawn from the model, shape (N, C, num_samples).

        They are divided by sqrt(num_samples), so that their outer products sum to an unbiased
        estimate of H.
        """

    @abc.abstractmethod
    def check_targets(self, targets: np.ndarray) -> None:
        """Raises ValueError where concrete targets of shape (N, C) are not of the right form."""


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """The mean squared error 1/(2N) sum_n |y_n - f_n|^2 (Karakida & Osawa 2020, Eq. 3).

    It is the likelihood of y ~ N(f, I), so H = I.
    """

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """The loss, a scalar."""
        return jnp.sum((outputs - targets) ** 2) / (2 * outputs.shape[0])

    def residual(self, outputs: Array, targets: Array) -> Array:
        """f - y, shape (N, C)."""
        return outputs - targets

    def fisher(self, outputs: Array) -> Array:
        """The identity for every sample, shape (N, C, C)."""
        n, c = outputs.shape
        return jnp.broadcast_to(jnp.eye(c, dtype=outputs.dtype), (n, c, c))

    def factor(self, outputs: Array) -> Array:
        """The identity for every sample, shape (N, C, C)."""
        return self.fisher(outputs)

    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """f - y, shape (N, C)."""
        return self.residual(outputs, targets)

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Standard normal draws over sqrt(num_samples), shape (N, C, num_samples)."""
        noise = jax.random.normal(key, (*outputs.shape, num_samples), outputs.dtype)
        return noise / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Any finite targets are fine."""


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """Softmax cross-entropy, the mean over samples of -sum_c y_c log softmax(f)_c.

    Targets are rows of probabilities (one-hot, or soft). With p = softmax(f): r = p - y and
    H = diag(p) - p p^T of rank C - 1 (Karakida & Osawa 2020, Section D). The factor R has C - 1
    columns, so the Gram matrices of the seeded Jacobian can have full rank.

    Args:
      output_damping: added to H, not to the Fisher: with a positive value the exact Fisher is
        J^T (H + output_damping I) J / N, whose undamped step in function space is
        (H + output_damping I)^{-1} (p - y) (Section D; R then has C columns).

    Raises:
      ValueError: output_damping is negative or not finite.
    """

    output_damping: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.output_damping < float("inf"):
            raise ValueError(
                f"output_damping must be 0 or positive and finite, got {self.output_damping}"
            )

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """The loss, a scalar."""
        return -jnp.sum(targets * jax.nn.log_softmax(outputs)) / outputs.shape[0]

    def residual(self, outputs: Array, targets: Array) -> Array:
        """p - y, shape (N, C)."""
        return jax.nn.softmax(outputs) - targets

    def fisher(self, outputs: Array) -> Array:
        """diag(p) - p p^T + output_damping I, shape (N, C, C)."""
        p = jax.nn.softmax(outputs)
        eye = jnp.eye(p.shape[1], dtype=p.dtype)
        return p[:, :, None] * (eye - p[:, None, :]) + self.output_damping * eye

    def factor(self, outputs: Array) -> Array:
        """R with R R^T = H: shape (N, C, C - 1), or (N, C, C) with an output damping.

        Undamped R = diag(sqrt p) Q, Q an orthonormal basis of the complement of sqrt p, because
        H = diag(sqrt p) (I - sqrt p sqrt p^T) diag(sqrt p).
        """
        if self.output_damping:
            root, direction, shrink = self._damped_terms(outputs)
            eye = jnp.eye(outputs.shape[1], dtype=outputs.dtype)
            inner = eye - shrink * direction[:, :, None] * direction[:, None, :]
            return root[:, :, None] * inner
        root = jnp.exp(0.5 * jax.nn.log_softmax(outputs))
        return root[:, :, None] * _complement(root)

    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """w with R w = r: Q^T (r / sqrt p), shape (N, C - 1) or (N, C)."""
        if self.output_damping:
            root, direction, shrink = self._damped_terms(outputs)
            scaled = self.residual(outputs, targets) / root
            along = jnp.sum(direction * scaled, axis=1, keepdims=True)
            return scaled + (shrink / (1 - shrink))[:, :, 0] * along * direction
        log_p = jax.nn.log_softmax(outputs)
        root = jnp.exp(0.5 * log_p)
        # y / sqrt p for a label whose probability underflows: bounded, so that 0 stays 0
        floor = -2 * jnp.log(jnp.finfo(outputs.dtype).max) / 3
        scaled = root - targets * jnp.exp(-0.5 * jnp.maximum(log_p, floor))
        return jnp.einsum("ncs,nc->ns", _complement(root), scaled)

    def _damped_terms(self, outputs: Array) -> tuple[Array, Array, Array]:
        """H + d I = E^{1/2} (I - u u^T) E^{1/2}, E = diag(p + d), u = p / sqrt(p + d).

        Returns sqrt(p + d), u / |u| and b with (I - b u u^T / |u|^2)^2 = I - u u^T.
        """
        p = jax.nn.softmax(outputs)
        root = jnp.sqrt(p + self.output_damping)
        u = p / root
        square = jnp.sum(u * u, axis=1, keepdims=True)
        return root, u / jnp.sqrt(square), (1 - jnp.sqrt(1 - square))[:, :, None]

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """(p - e_k) / sqrt(num_samples) with classes k drawn from p, shape (N, C, num_samples)."""
        n, c = outputs.shape
        classes = jax.random.categorical(key, outputs[:, None, :], shape=(n, num_samples))
        drawn = jax.nn.one_hot(classes, c, dtype=outputs.dtype)
        residual = jax.nn.softmax(outputs)[:, None, :] - drawn
        return residual.swapaxes(1, 2) / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Targets must be rows of probabilities over two classes at least.

        Raises:
          ValueError: one column only, a negative entry, or a row that does not sum to 1.
        """
        if targets.shape[1] < 2:
            raise ValueError(
                f"softmax cross-entropy needs C >= 2 outputs, got targets of {targets.shape}; use "
                "two one-hot columns for a binary problem"
            )
        sums = targets.sum(axis=1)
        if targets.min() < 0 or np.abs(sums - 1).max() > 1e-3:
            raise ValueError(
                "targets of softmax cross-entropy must be rows of probabilities (one-hot or soft) "
                f"that sum to 1; found entries from {targets.min():g} to {targets.max():g} and row "
                f"sums from {sums.min():g} to {sums.max():g}"
            )


def _complement(unit: Array) -> Array:
    """Orthonormal bases (N, C, C - 1) of the complements of unit vectors (N, C), by Householder."""
    # reflects the unit vector onto the last axis; all entries of sqrt(p) are >= 0, so adding is
    # free of cancellation
    c = unit.shape[1]
    v = unit.at[:, -1].add(1.0)
    v = v * jax.lax.rsqrt(jnp.sum(v * v, axis=1, keepdims=True))
    eye = jnp.eye(c, dtype=unit.dtype)
    return (eye - 2 * v[:, :, None] * v[:, None, :])[:, :, :-1]
