"""Softmax cross-entropy, exact to rounding where samples are confidently right or wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.scalars import check_number, keep_plain
from natgrad_flax.losses.base import IntegerTargets, Loss, drawn


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """Softmax cross-entropy, the mean over samples of -sum_c y_c log softmax(f)_c.

    Targets are rows of probabilities (one-hot, or soft), shape (N, C), or class numbers, integers
    of shape (N,), for which no one-hot rows are kept. With p = softmax(f): r = p - y and
    H = diag(p) - p p^T of rank C - 1 (Karakida & Osawa 2020, Section D). The factor R has C - 1
    columns, so the Gram matrices of the Jacobian weighted by it can have full rank.

    Args:
      output_damping: added to H, not to the Fisher: with a positive value the exact Fisher is
        J^T (H + output_damping I) J / N, whose undamped step in function space is
        (H + output_damping I)^{-1} (p - y) (Section D; R then has C columns).
      label_smoothing: s, which makes (1 - s) y + s / C of targets y (Szegedy et al. 2016). The
        Fisher is that of the model as before.

    Raises:
      ValueError: output_damping is negative or not finite, or label_smoothing not in [0, 1).

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> loss = ng.SoftmaxCrossEntropy()
      >>> f, labels = jnp.zeros((2, 4)), jnp.array([3, 1])
      >>> bool(jnp.isclose(loss(f, labels), jnp.log(4)))
      True
      >>> print(loss.residual(f, labels).round(2))  # p - y
      [[ 0.25  0.25  0.25 -0.75]
       [ 0.25 -0.75  0.25  0.25]]
      >>> loss.factor(f).shape  # C - 1 directions a sample
      (2, 4, 3)
    """

    output_damping: float = 0.0
    label_smoothing: float = 0.0
    integer_targets: ClassVar[IntegerTargets] = "labels"

    def __post_init__(self) -> None:
        check_number("output_damping", self.output_damping, positive=False)
        if check_number("label_smoothing", self.label_smoothing, positive=False) >= 1:
            raise ValueError(f"label_smoothing must be below 1, got {self.label_smoothing!r}")
        keep_plain(self)

    def __repr__(self) -> str:
        # configurations of the leaderboard are hashed with the text of a loss
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return f"SoftmaxCrossEntropy(output_damping={self.output_damping}{smoothing})"

    def values(self, outputs: Array, targets: Array) -> Array:
        """-sum_c y_c log softmax(f)_c of every sample, shape (N,)."""
        log_p = jax.nn.log_softmax(outputs)
        if targets.ndim == outputs.ndim:
            return -jnp.sum(self._targets(targets, outputs) * log_p, axis=1)
        (found,) = jnp.take_along_axis(log_p, targets[:, None], axis=1).T
        s = self.label_smoothing
        return -found if s == 0 else -(1 - s) * found - s * jnp.mean(log_p, axis=1)

    def mean(self, outputs: Array, targets: Array) -> Array:
        """The loss, a scalar."""
        if targets.ndim < outputs.ndim:
            return super().mean(outputs, targets)
        targets = self._targets(targets, outputs)
        return -jnp.sum(targets * jax.nn.log_softmax(outputs)) / outputs.shape[0]

    def _targets(self, targets: Array, outputs: Array) -> Array:
        """Rows of probabilities, smoothed; of class numbers by a comparison that XLA fuses."""
        c, s = outputs.shape[1], self.label_smoothing
        if targets.ndim < outputs.ndim:
            targets = (jnp.arange(c) == targets[:, None]).astype(outputs.dtype)
        return targets if s == 0 else (1 - s) * targets + s / c

    def residual(self, outputs: Array, targets: Array) -> Array:
        """p sum(y) - y, which is p - y, shape (N, C); its rows sum to 0."""
        targets = self._targets(targets, outputs)
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

    def fisher_product(self, outputs: Array, vectors: Array, targets: Array | None = None) -> Array:
        """p (v - p . v), no matrix of classes, with output_damping v; shape (N, C)."""
        p = _probabilities(outputs)
        centred = vectors - jnp.sum(p * vectors, axis=1, keepdims=True)
        return p * centred + self.output_damping * vectors

    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """w with R w = r: Q^T (r / sqrt p), shape (N, C - 1) or (N, C)."""
        targets = self._targets(targets, outputs)
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
        noise = drawn(jax.random.gumbel, key, (n, num_samples, c), outputs.dtype)
        classes = jnp.argmax(noise + outputs[:, None, :], axis=2)  # jax.random.categorical
        targets = jax.nn.one_hot(classes, c, dtype=outputs.dtype)
        p, winner = _probabilities(outputs), _winner(outputs)
        residual = _residual(p[:, None, :], winner[:, None, :], targets)
        return residual.swapaxes(1, 2) / num_samples**0.5

    def check_targets(self, targets: np.ndarray) -> None:
        """Targets must be rows of probabilities over two classes at least, or class numbers.

        Raises:
          ValueError: one column only, a negative entry, or a row that does not sum to 1.
        """
        if targets.dtype.kind in "iu":
            return
        if targets.shape[-1] < 2:
            raise ValueError(
                f"softmax cross-entropy needs C >= 2 outputs, got targets of {targets.shape}; use "
                "two one-hot columns for a binary problem, or ng.SigmoidCrossEntropy()"
            )
        sums = targets.sum(axis=-1)
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
