"""One factor A = r^T r / d of a Kronecker product, from its rows r."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import (
    add_diagonal,
    eigh,
    inverse_psd,
    psd_eigenvalues,
    reciprocal,
    solve_psd,
    symmetric_product,
)
from natgrad_flax.linalg.execution import by_rows
from natgrad_flax.operators.base import (
    Space,
    extreme_eigenvalues,
    in_parameters,
    log_determinant,
)
from natgrad_flax.operators.least_squares import least_squares, normal_solve
from natgrad_flax.signals.base import matrix_of
from natgrad_flax.signals.dense import DenseSignals


class Rows(Protocol):
    """A matrix r (R, P) by its products; at infinite width only Gram matrices are known."""

    @property
    def shape(self) -> tuple[int, int]:
        """(R, P)."""

    def array(self) -> Array:
        """r itself."""

    def gram(self, other: Any = None) -> Array:
        """r r'^T, shape (R, R')."""

    def transposed_times(self, matrix: Array) -> Array:
        """r^T c for c (R, k), shape (P, k)."""


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclass(frozen=True)
class ArrayRows:
    """Rows that are held."""

    rows: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(R, P)."""
        rows, params = self.rows.shape
        return rows, params

    def array(self) -> Array:
        """r."""
        return self.rows

    def gram(self, other: ArrayRows | None = None) -> Array:
        """r r'^T."""
        return symmetric_product(self.rows) if other is None else self.rows @ other.rows.T

    def transposed_times(self, matrix: Array) -> Array:
        """r^T c."""
        return self.rows.T @ matrix


@dataclass(frozen=True)
class InputRows:
    """The inputs of a layer, one row a sample; the column of the bias is not held."""

    layer: DenseSignals

    @property
    def shape(self) -> tuple[int, int]:
        """(N, fan_in)."""
        return self.layer.num_samples, self.layer.fan_in

    def array(self) -> Array:
        """a, shape (N, fan_in)."""
        return self.layer.augmented_inputs()

    def gram(self, other: InputRows | None = None) -> Array:
        """a a'^T."""
        return self.layer.input_gram(None if other is None else other.layer)

    def transposed_times(self, matrix: Array) -> Array:
        """a^T c."""
        return matrix_of(self.layer.local_vjp(matrix))


@dataclass(frozen=True)
class UnitRows:
    """The derivatives D with respect to the units, one row a sample and output direction."""

    layer: DenseSignals

    @property
    def shape(self) -> tuple[int, int]:
        """(N S, M)."""
        return self.layer.num_samples * self.layer.num_directions, self.layer.num_units

    def array(self) -> Array:
        """D, shape (N S, M)."""
        return self.layer.flat_derivatives()

    def gram(self, other: UnitRows | None = None) -> Array:
        """D D'^T."""
        return self.layer.derivative_gram(None if other is None else other.layer)

    def transposed_times(self, matrix: Array) -> Array:
        """D^T c."""
        return self.array().T @ matrix


@partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "times"], meta_fields=["fixed", "space"]
)
@dataclass(frozen=True)
class Factor:
    """A = r^T r / d, solved with on the smaller side.

    Attributes:
      rows: r, shape (R, P).
      fixed: d, or what of it is known beforehand.
      space: "sample" for (R, R) systems, "parameter" for (P, P), "auto" for the smaller.
      times: the rest of d, where that depends on the weights of a batch; with an axis of groups
        where the rows have one.
    """

    rows: Any
    fixed: float
    space: Space = "auto"
    times: Array | None = None

    @property
    def divisor(self) -> float | Array:
        """d."""
        return self.fixed if self.times is None else self.fixed * self.times

    @property
    def in_parameters(self) -> bool:
        """Whether systems are (P, P)."""
        return in_parameters(self.space, *self.rows.shape)

    @property
    def side(self) -> int:
        """Of the systems that are solved."""
        return self.rows.shape[self.in_parameters]

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """A + rho, shape (P, P)."""
        rows = self.rows.array()
        return add_diagonal(rows.T @ rows / self.divisor, damping)

    def system(self, damping: Array | float) -> Array:
        """What is factorised: A + rho, or r r^T + d rho."""
        if self.in_parameters:
            return self.to_dense(damping)
        return add_diagonal(by_rows(self.rows.gram()), self.divisor * damping)

    def solve(self, target: Array, damping: Array | float) -> Array:
        """(A + rho)^{-1} G for any G of shape (P, k)."""
        if is_zero(damping):
            return normal_solve(self.rows.array(), self.divisor * target)
        if self.in_parameters:
            return solve_psd(self.system(damping), target, shifted=True)
        dual = self._dual(damping, target.shape[1])(self.rows.array() @ target)
        return (target - self.rows.transposed_times(dual)) / damping

    def solve_range(self, coefficients: Array, damping: Array | float) -> Array:
        """(A + rho)^{-1} r^T C for C of shape (R, k), without a division by rho."""
        if not self.in_parameters:
            dual = self._dual(damping, coefficients.shape[1])(self.divisor * coefficients)
            return self.rows.transposed_times(dual)
        if is_zero(damping):
            return self.divisor * least_squares(self.rows.array(), coefficients)
        target = self.rows.transposed_times(coefficients)
        return solve_psd(self.system(damping), target, shifted=True)

    def _dual(self, damping: Array | float, columns: int) -> Callable[[Array], Array]:
        """Solves in sample space; an explicit inverse leaves one product with wide sides."""
        system, shifted = self.system(damping), not is_zero(damping)
        if columns < len(system):
            return lambda target: solve_psd(system, target, shifted=shifted)
        inverse = inverse_psd(system, shifted=shifted)
        return lambda target: inverse @ target

    def cross(self, test: Rows, damping: Array | float) -> Array:
        """r' (A + rho)^{-1} r^T, shape (R', R); in sample space by Gram matrices alone."""
        system, shifted = self.system(damping), not is_zero(damping)
        if self.in_parameters:
            return test.array() @ solve_psd(system, self.rows.array().T, shifted=shifted)
        return self.divisor * solve_psd(system, self.rows.gram(test), shifted=shifted).T

    def matvec(self, matrix: Array) -> Array:
        """A G for G of shape (P, k)."""
        rows = self.rows.array()
        return rows.T @ (rows @ matrix) / self.divisor

    def diagonal(self) -> Array:
        """Of A, shape (P,)."""
        return jnp.sum(self.rows.array() ** 2, axis=0) / self.divisor

    def root_times(self, matrix: Array, damping: Array | float) -> Array:
        """(A + rho)^(1/2) Z for Z of shape (P, k)."""
        values, vectors = eigh(self.to_dense())
        root = vectors * jnp.sqrt(jnp.maximum(values, 0) + damping) @ vectors.T
        return root @ matrix

    def logdet(self, damping: Array | float) -> Array:
        """log det(A + rho), shape ()."""
        return log_determinant(self.eigenvalues(), self.rows.shape[1], damping)

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """The smallest and the largest eigenvalue of A + rho."""
        return extreme_eigenvalues(self.eigenvalues(), self.rows.shape[1], damping)

    def eigenvalues(self) -> Array:
        """Of A, those that may be other than zero."""
        if self.rows.shape[1] < self.rows.shape[0]:
            return psd_eigenvalues(self.to_dense())
        return psd_eigenvalues(self.rows.gram() / self.divisor)


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclass(frozen=True)
class DiagonalFactor:
    """A factor that is a diagonal, as that of one-hot inputs; it answers as ``Factor`` does.

    Attributes:
      values: the diagonal of A, shape (P,).
    """

    values: Array

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """A + rho, shape (P, P)."""
        return jnp.diag(self.values + damping)

    def solve(self, target: Array, damping: Array | float) -> Array:
        """(A + rho)^{-1} G for G of shape (P, k); 0 where the undamped diagonal is 0."""
        return reciprocal(self.values + damping)[:, None] * target

    def matvec(self, matrix: Array) -> Array:
        """A G."""
        return self.values[:, None] * matrix

    def diagonal(self) -> Array:
        """Of A."""
        return self.values

    def root_times(self, matrix: Array, damping: Array | float) -> Array:
        """(A + rho)^(1/2) Z."""
        return jnp.sqrt(self.values + damping)[:, None] * matrix

    def logdet(self, damping: Array | float) -> Array:
        """log det(A + rho), shape ()."""
        return log_determinant(self.values, len(self.values), damping)

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """The smallest and the largest eigenvalue of A + rho."""
        return extreme_eigenvalues(self.values, len(self.values), damping)

    def eigenvalues(self) -> Array:
        """The diagonal."""
        return self.values


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclass(frozen=True)
class IdentityFactor:
    """The identity where a factor would stand; it answers as ``Factor`` does, and takes no damping.

    Attributes:
      rows: r of the factor in whose place it stands, shape (R, P).
    """

    rows: Any
    in_parameters = True

    @property
    def _ones(self) -> Array:
        return jnp.ones(self.rows.shape[1], self.rows.array().dtype)

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """I, shape (P, P)."""
        del damping
        return jnp.diag(self._ones)

    def solve(self, target: Array, damping: Array | float = 0.0) -> Array:
        """G itself, shape (P, k)."""
        del damping
        return target

    matvec = root_times = solve

    def solve_range(self, coefficients: Array, damping: Array | float) -> Array:
        """r^T C for C of shape (R, k)."""
        del damping
        return self.rows.transposed_times(coefficients)

    def cross(self, test: Rows, damping: Array | float) -> Array:
        """r' r^T, shape (R', R)."""
        del damping
        return test.gram(self.rows)

    def diagonal(self) -> Array:
        """Ones, shape (P,)."""
        return self._ones

    eigenvalues = diagonal

    def logdet(self, damping: Array | float) -> Array:
        """0."""
        del damping
        return jnp.zeros((), self._ones.dtype)

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """1 and 1."""
        del damping
        one = jnp.ones((), self._ones.dtype)
        return one, one
