"""Ways to apply the inverse of a damped second moment (1/N) sum z_n z_n^T + shift I.

Bernacchia et al. (2018) invert it directly, and name moving estimates by Sherman-Morrison updates
and randomised SVD (Halko et al. 2011) as what to use for large layers.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.scalars import check_integer, check_number, keep_plain
from natgrad_flax.linalg.dense import add_diagonal, solve_psd


@dataclass(frozen=True)
class InverseMoment(abc.ABC):
    """How the inverse second moments of inputs and errors are applied to a gradient.

    A setting of ``online_natural_gradient_descent``, which calls ``init`` and ``solve``.

    Example:
      >>> from natgrad_flax import linear
      >>> isinstance(linear.DirectInverse(), linear.InverseMoment)
      True
    """

    @abc.abstractmethod
    def init(self, size: int, dtype: jnp.dtype) -> Array:
        """What is kept between steps for a second moment of this size."""

    @abc.abstractmethod
    def solve(
        self, state: Array, rows: Array, rhs: Array, shift: Array, key: Array, first: Array
    ) -> tuple[Array, Array]:
        """An estimate of (rows^T rows + shift I)^{-1} rhs, and what is kept.

        Args:
          state: from ``init`` or the last call.
          rows: the samples over sqrt(N), shape (N, n): the second moment is rows^T rows.
          rhs: shape (n, k).
          shift: the damping, a scalar.
          key: a jax.random key.
          first: whether this is the first step.
        """


@dataclass(frozen=True)
class DirectInverse(InverseMoment):
    """The second moment of the batch, inverted by Cholesky: n^3 flops.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from natgrad_flax import linear
      >>> # three samples over sqrt(N)
      >>> inverse, rows = linear.DirectInverse(), jnp.eye(3) / 3**0.5
      >>> state, right = inverse.init(3, jnp.float32), jnp.ones((3, 1))
      >>> solved, _ = inverse.solve(state, rows, right, 1.0, jax.random.key(0), True)
      >>> bool(jnp.allclose(solved, 1 / (1 / 3 + 1)))
      True
    """

    def init(self, size: int, dtype: jnp.dtype) -> Array:
        """Nothing."""
        return jnp.zeros((0,), dtype)

    def solve(
        self, state: Array, rows: Array, rhs: Array, shift: Array, key: Array, first: Array
    ) -> tuple[Array, Array]:
        """The inverse itself."""
        return solve_psd(add_diagonal(rows.T @ rows, shift), rhs, shifted=True), state


@dataclass(frozen=True)
class RandomisedSVD(InverseMoment):
    """The leading eigenvectors of the second moment by a randomised range finder.

    The second moment is never formed: N n (rank + oversampling) flops a product instead of N n^2,
    and no factorisation of size n. Directions outside of the found ones count with the mean of
    the remaining eigenvalues.

    Args:
      rank: number of eigenvectors, at most n and N are used.
      oversampling: additional random directions.
      power_iterations: of the range finder; more for a slowly falling spectrum.

    Raises:
      ValueError: a number out of range.

    Example:
      >>> from natgrad_flax import linear
      >>> inverse = linear.RandomisedSVD(rank=2)
      >>> tx = linear.online_natural_gradient_descent(0.5, inverse=inverse)
      >>> inverse
      RandomisedSVD(rank=2, oversampling=10, power_iterations=2)
    """

    rank: int
    oversampling: int = 10
    power_iterations: int = 2

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_integer("oversampling", self.oversampling, 0)
        check_integer("power_iterations", self.power_iterations, 0)
        keep_plain(self)

    def init(self, size: int, dtype: jnp.dtype) -> Array:
        """Nothing."""
        return jnp.zeros((0,), dtype)

    def solve(
        self, state: Array, rows: Array, rhs: Array, shift: Array, key: Array, first: Array
    ) -> tuple[Array, Array]:
        """Division by eigenvalues in the found subspace, by their mean outside of it."""
        values, vectors = self.eigenvectors(rows, key)
        outside = rows.shape[1] - len(values)
        total = jnp.sum(rows**2)
        rest = jnp.maximum(total - jnp.sum(values), 0) / max(outside, 1) + shift
        cutoff = rows.shape[1] * jnp.finfo(rows.dtype).eps * total
        inside = vectors.T @ rhs
        kept = _safe_inverse(values + shift, cutoff)[:, None] * inside
        complement = (rhs - vectors @ inside) * _safe_inverse(rest, cutoff)
        return vectors @ kept + complement, state

    def eigenvectors(self, rows: Array, key: Array) -> tuple[Array, Array]:
        """Leading eigenvalues (r,) and eigenvectors (n, r) of rows^T rows, largest first."""
        limit = min(rows.shape)
        width = min(self.rank + self.oversampling, limit)
        probes = jax.random.normal(key, (rows.shape[1], width), rows.dtype)
        basis = jnp.linalg.qr(rows.T @ (rows @ probes))[0]
        for _ in range(self.power_iterations):
            basis = jnp.linalg.qr(rows.T @ (rows @ basis))[0]
        _, singular, right = jnp.linalg.svd(rows @ basis, full_matrices=False)
        count = min(self.rank, limit)
        return singular[:count] ** 2, basis @ right[:count].T


def _safe_inverse(values: Array, cutoff: Array) -> Array:
    large = values > cutoff
    return jnp.where(large, 1 / jnp.where(large, values, 1), 0)


@dataclass(frozen=True)
class MovingInverse(InverseMoment):
    """A moving average of second moments whose inverse is updated by Woodbury's identity.

    Lambda <- decay Lambda + (1 - decay) (second moment of some rows of the batch + shift I). No
    factorisation of size n: n^2 times the number of rows, and a system of that size. The shift has
    full rank, so it enters as random rows whose second moment is shift I on average; an adaptive
    damping so acts within about 1 / (1 - decay) steps.

    Args:
      decay: within (0, 1), the weight of the past.
      rows: samples of the batch used a step, drawn at random; fewer than n to be worth it. One is
        the Sherman-Morrison update.

    Raises:
      ValueError: a number out of range.

    Example:
      >>> from natgrad_flax import linear
      >>> inverse = linear.MovingInverse(decay=0.9, rows=8)
      >>> tx = linear.online_natural_gradient_descent(0.5, inverse=inverse)
      >>> inverse.init(3, "float32").shape
      (3, 3)
    """

    decay: float = 0.95
    rows: int = 64

    def __post_init__(self) -> None:
        check_integer("rows", self.rows, 1)
        if check_number("decay", self.decay, positive=True) >= 1:
            raise ValueError(f"decay must lie between 0 and 1, got {self.decay}")
        keep_plain(self)

    def init(self, size: int, dtype: jnp.dtype) -> Array:
        """The inverse; replaced at the first step by that of a multiple of I."""
        return jnp.eye(size, dtype=dtype)

    def solve(
        self, state: Array, rows: Array, rhs: Array, shift: Array, key: Array, first: Array
    ) -> tuple[Array, Array]:
        """The updated inverse times the right-hand side."""
        count, size = rows.shape
        mean = jnp.sum(rows**2) / size + shift
        state = jnp.where(first, jnp.eye(size, dtype=rows.dtype) / mean, state)
        draw, noise = jax.random.split(key)
        used = min(self.rows, count)
        chosen = jax.random.choice(draw, count, (used,), replace=False)
        sampled = rows[chosen] * math.sqrt(count / used)
        ridge = math.ceil(size * (1 - self.decay))
        damping = jax.random.normal(noise, (ridge, size), rows.dtype) * jnp.sqrt(shift / ridge)
        state = woodbury(state, jnp.concatenate([sampled, damping]), self.decay)
        return state @ rhs, state


def woodbury(inverse: Array, rows: Array, decay: float | Array) -> Array:
    """(decay M + (1 - decay) rows^T rows)^{-1} from M^{-1}: n^2 r flops for r rows.

    Args:
      inverse: M^{-1}, symmetric positive definite, shape (n, n).
      rows: shape (r, n); with one row this is the Sherman-Morrison formula.
      decay: within (0, 1).
    """
    scaled = inverse / decay
    mixed = rows @ scaled
    small = add_diagonal(mixed @ rows.T, 1 / (1 - decay))
    updated = scaled - mixed.T @ solve_psd(small, mixed, shifted=True)
    return (updated + updated.T) / 2
