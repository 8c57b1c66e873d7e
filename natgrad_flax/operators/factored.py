"""Matrices of low rank, from factors with orthogonal columns."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import above_rounding, add_diagonal, eigh, reciprocal
from natgrad_flax.operators.base import Operator, add, noise
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, ravel, unravel
from natgrad_flax.signals.gradient import Gradient


def largest_part(rows: Array, rank: int) -> tuple[Array, Array]:
    """The part of rows^T rows that its largest eigenvalues make up, as C C^T.

    Args:
      rows: shape (R, Q).
      rank: eigenvalues that are kept; rounding is not.

    Returns:
      C, shape (Q, r) with r = min(rank, R, Q), whose columns are orthogonal, and the squares of
      their norms, the eigenvalues, shape (r,).
    """
    small = rows.shape[1] <= rows.shape[0]
    values, vectors = eigh(rows.T @ rows if small else rows @ rows.T)
    # in ascending order
    values, vectors = above_rounding(values)[-rank:], vectors[:, -rank:]
    if small:
        return vectors * jnp.sqrt(values), values
    return rows.T @ vectors * (values != 0), values


@dataclass(frozen=True)
class Factored(Operator):
    """C C^T for each of B blocks of Q parameters, with orthogonal columns of C.

    Attributes:
      layers: signals of the layers whose parameters these are.
      factors: C, shape (B, Q, r). The parameters of block b are every B-th of ``ravel``, from b on:
        those of a unit where B counts the units of one layer, and all where B = 1.
      values: the squared norms of the columns, shape (B, r).
    """

    layers: tuple[LayerSignals, ...]
    factors: Array
    values: Array

    @property
    def num_params(self) -> int:
        """B Q."""
        return self.factors.shape[0] * self.factors.shape[1]

    def _blocks(self, vector: tuple[LayerUpdate, ...]) -> Array:
        """A vector of parameters as (B, Q)."""
        return ravel(vector).reshape(-1, len(self.factors)).T

    def _updates(self, blocks: Array) -> tuple[LayerUpdate, ...]:
        """The inverse of ``_blocks``."""
        return unravel(self.layers, blocks.T.reshape(-1))

    def _inner(self, blocks: Array) -> Array:
        """C^T u of every block, (B, r)."""
        return jnp.einsum("bqr,bq->br", self.factors, blocks)

    def _times(self, coefficients: Array) -> Array:
        """C v of every block, (B, Q)."""
        return jnp.einsum("bqr,br->bq", self.factors, coefficients)

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``."""
        g = self._blocks(gradient.vector(self.layers))
        inner = self._inner(g)
        if is_zero(damping):
            return self._updates(self._times(inner * reciprocal(self.values) ** 2))
        return self._updates((g - self._times(inner / (self.values + damping))) / damping)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        return self._updates(self._times(self._inner(self._blocks(vector))))

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""
        return self._updates(jnp.sum(self.factors**2, axis=2))

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        return jnp.sum(self.values)

    def eigenvalues(self) -> Array:
        """Of all blocks, one after the other."""
        return self.values.reshape(-1)

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """C z of every block and noise of variance rho, with z standard normal."""
        keys = jax.random.split(key)
        draw = jax.random.normal(keys[0], self.values.shape, self.values.dtype)
        return add(self._updates(self._times(draw)), noise(keys[1], self.layers, damping))

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """C C^T between the parameters of one block, plus rho I."""
        count, eye = self.num_params, jnp.eye(len(self.factors), dtype=self.factors.dtype)
        dense = jnp.einsum("bqr,bpr,bc->qbpc", self.factors, self.factors, eye)
        return add_diagonal(dense.reshape(count, count), damping)
