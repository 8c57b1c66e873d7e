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
    columns, so the Gram matrices of the Jacobian weighted by it can have full rank.

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
        """p sum(y) - y, which is p - y, shape (N, C); its rows sum to 0."""
        return _residual(_probabilities(outputs), _winner(outputs), targets)

    def fisher(self, outputs: Array) -> Array:
        """diag(p) - p p^T + output_damping I, shape (N, C, C)."""
        p = _probabilities(outputs)
        diagonal = p * _rest(p, _winner(outputs)) + self.output_damping
        return _with_diagonal(diagonal, -p[:, :, None] * p[:, None, :])

    def factor(self, outputs: Array) -> Array:
        """R with R R^T = H: shape (N, C, C - 1), or (N, C, C) with an output damping.

        Undamped R = diag(sqrt p) Q, Q an orthonormal basis of the complement of sqrt p, because
        H = diag(sqrt p) (I - sqrt p sqrt p^T) diag(sqrt p). Q is the Householder reflection that
        takes sqrt p to the axis of the likeliest class w, less that axis; so R has a column for
        each other class j, sqrt(p_j) (e_j - m) with m_c = p_c / (1 + sqrt p_w), m_w = sqrt p_w.
        """
        if self.output_damping:
            root, direction, inner = self._damped_terms(outputs)
            along = direction**2
            diagonal = _rest(along, _winner(outputs)) + inner * along
            shrunk = (inner - 1) * direction
            return root[:, :, None] * _with_diagonal(
                diagonal, shrunk[:, :, None] * direction[:, None, :]
            )
        p, winner = _probabilities(outputs), _winner(outputs)
        root = _winning_root(p, winner)
        mean = jnp.where(winner, root, p / (1 + root))
        chosen = _of_others(jnp.eye(p.shape[1], dtype=p.dtype), winner[:, None, :])
        columns = _of_others(_root(outputs), winner)
        return columns[:, None, :] * (chosen - mean[:, :, None])

    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """w with R w = r: Q^T (r / sqrt p), shape (N, C - 1) or (N, C)."""
        p, winner = _probabilities(outputs), _winner(outputs)
        if self.output_damping:
            root, direction, inner = self._damped_terms(outputs)
            scaled = _residual(p, winner, targets) / root
            along = jnp.sum(direction * scaled, axis=1, keepdims=True)
            return scaled + (1 / inner - 1) * along * direction
        # Q^T sqrt p = 0, so only y / sqrt p counts; the columns are those of the factor
        root = _winning_root(p, winner)
        won = jnp.sum(winner * targets, axis=1, keepdims=True)
        along = (jnp.sum(targets, axis=1, keepdims=True) + won / root) / (1 + root)
        scaled = (p * along - targets) / _root(outputs)
        return _of_others(scaled, winner)

    def columns_in_range(self, outputs: Array) -> Array | None:
        """Classes whose probability is above eps times the largest of those that are not likeliest.

        A column of R has a squared norm between p_j and 2 p_j.
        """
        if self.output_damping:
            return None
        p = _of_others(_probabilities(outputs), _winner(outputs))
        return p > jnp.finfo(p.dtype).eps * jnp.max(p)

    def _damped_terms(self, outputs: Array) -> tuple[Array, Array, Array]:
        """H + d I = E^{1/2} (I - u u^T) E^{1/2}, E = diag(p + d), u = p / sqrt(p + d).

        Returns sqrt(p + d), u / |u| and sqrt(1 - |u|^2), for which
        (I - (1 - sqrt(1 - |u|^2)) u u^T / |u|^2)^2 = I - u u^T.
        """
        p, damping = _probabilities(outputs), self.output_damping
        root = jnp.sqrt(p + damping)
        u = p / root
        norm = jnp.sqrt(jnp.sum(u * u, axis=1, keepdims=True))
        # 1 - |u|^2 without the difference, as the p sum to 1
        inner = jnp.sum(p * (damping / (p + damping)), axis=1, keepdims=True)
        return root, u / norm, jnp.sqrt(inner)

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """(p - e_k) / sqrt(num_samples) with classes k drawn from p, shape (N, C, num_samples)."""
        n, c = outputs.shape
        classes = jax.random.categorical(key, outputs[:, None, :], shape=(n, num_samples))
        drawn = jax.nn.one_hot(classes, c, dtype=outputs.dtype)
        p, winner = _probabilities(outputs), _winner(outputs)
        residual = _residual(p[:, None, :], winner[:, None, :], drawn)
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


def _probabilities(outputs: Array) -> Array:
    """Softmax."""
    return jnp.exp(jax.nn.log_softmax(outputs))


def _winner(outputs: Array) -> Array:
    """Whether a class is the likeliest of its sample, the first of equals, shape (N, C)."""
    c = outputs.shape[1]
    return jnp.arange(c) == jnp.argmax(outputs, axis=1, keepdims=True)


def _winning_root(p: Array, winner: Array) -> Array:
    """sqrt p of the likeliest class, shape (N, 1)."""
    return jnp.sqrt(jnp.sum(winner * p, axis=1, keepdims=True))


def _of_others(x: Array, winner: Array) -> Array:
    """x (..., C) of the classes but the likeliest, the last class in the place of that one."""
    return jnp.where(winner[..., :-1], x[..., -1:], x[..., :-1])


def _root(outputs: Array) -> Array:
    """sqrt p, kept so far from 0 that 1 / sqrt p, and its quotient by a damping, stay finite.

    What it adds to p, the square root of the smallest normal number, is far below rounding.
    """
    p = _probabilities(outputs)
    return jnp.sqrt(jnp.maximum(p, float(jnp.finfo(p.dtype).tiny) ** 0.5))


def _with_diagonal(diagonal: Array, matrices: Array) -> Array:
    """Matrices (N, C, C) with another diagonal (N, C)."""
    return jnp.where(jnp.eye(matrices.shape[1], dtype=bool), diagonal[:, :, None], matrices)


def _rest(p: Array, winner: Array) -> Array:
    """1 - p for p that sum to 1: of the likeliest class the sum of the others, uncancelled."""
    others = jnp.sum(jnp.where(winner, 0, p), axis=-1, keepdims=True)
    return jnp.where(winner, others, 1 - p)


def _residual(p: Array, winner: Array, targets: Array) -> Array:
    """p sum(y) - y along the last axis; that of the likeliest class is minus the others' sum."""
    plain = p * jnp.sum(targets, axis=-1, keepdims=True) - targets
    others = jnp.sum(jnp.where(winner, 0, plain), axis=-1, keepdims=True)
    return jnp.where(winner, -others, plain)
