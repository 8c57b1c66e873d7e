"""Kronecker products of two factors, for an affine layer or for each group of its units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import inverse_psd
from natgrad_flax.linalg.execution import cubic
from natgrad_flax.operators.base import OfLayer, Space
from natgrad_flax.operators.factor import ArrayRows, DiagonalFactor, Factor, InputRows, UnitRows
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals, expand_samples
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.signals.lookup import LookupSignals
from natgrad_flax.signals.shared import SharedSignals, Sharing

AffineSignals = DenseSignals | SharedSignals
"""Signals of an affine layer, which has Kronecker factors."""

Dampings = tuple[Array | float, Array | float]
"""What is added to A and to B."""


def affine(layer: LayerSignals) -> AffineSignals:
    """A layer of which is known that it is no ``ExplicitSignals``."""
    return cast(AffineSignals, layer)


def factor_rows(layer: AffineSignals, sharing: Sharing) -> tuple[Array, Array]:
    """Rows of A and B for each group, (G, R, fan_in) and (G, R', M/G)."""
    if isinstance(layer, SharedSignals):
        return layer.rows(sharing)
    return weighted_inputs(layer)[None], layer.flat_derivatives()[None]


def weighted_inputs(layer: DenseSignals) -> Array:
    """Rows of A, shape (N, fan_in): the inputs times the root of their weights."""
    inputs = layer.augmented_inputs()
    return inputs if layer.row_weights is None else jnp.sqrt(layer.row_weights)[:, None] * inputs


def over_row_weights(layer: DenseSignals, cotangents: Array) -> Array:
    """C (N, k) with r^T C = a^T R for the rows r of A, from cotangents R of the units.

    A sample of weight 0 has no row, and R = 0.
    """
    if layer.row_weights is None:
        return cotangents
    root = jnp.sqrt(layer.row_weights)[:, None]
    return jnp.where(root > 0, cotangents / jnp.where(root > 0, root, 1), 0)


@dataclass(frozen=True)
class Kronecker(OfLayer):
    """A (x) B of an affine layer, for each group of units; (A + rho_A) (x) (B + rho_B) damped.

    Attributes:
      layer: the signals.
      left: A, a ``Factor``; of shared weights with the rows of all groups, (G, R, fan_in); of
        one-hot inputs a ``DiagonalFactor``.
      right: B, likewise; either may be an ``IdentityFactor``.
      split: from a damping to what is added to both factors.
    """

    layer: AffineSignals
    left: Any
    right: Any
    split: Callable[[Array | float], Dampings]

    @classmethod
    def of(
        cls,
        layer: AffineSignals,
        sharing: Sharing,
        divisors: tuple[float | Array, float | Array],
        space: Space,
        split: Callable[[Array | float], Dampings],
    ) -> Kronecker:
        """The factors of a layer.

        Args:
          layer: the signals.
          sharing: how positions that share weights are counted.
          divisors: of A and of B.
          space: of the solves.
          split: as the attribute.
        """
        sides: tuple[Any, Any]
        if isinstance(layer, SharedSignals) and layer.has_diagonal_inputs(sharing):
            layer = cast(LookupSignals, layer)
            units = ArrayRows(layer.unit_rows(sharing))
            counts = DiagonalFactor(layer.counts()[None] / divisors[0])
            return cls(layer, counts, _factor(units, divisors[1], space, 1), split)
        if isinstance(layer, SharedSignals):
            left, right = layer.rows(sharing)
            sides = ArrayRows(left), ArrayRows(right)
        elif layer.row_weights is None:
            sides = InputRows(layer), UnitRows(layer)
        else:
            sides = ArrayRows(weighted_inputs(layer)), UnitRows(layer)
        groups = layer.num_groups if isinstance(layer, SharedSignals) else None
        a, b = (
            _factor(rows, over, space, groups) for rows, over in zip(sides, divisors, strict=True)
        )
        return cls(layer, a, b, split)

    @property
    def groups(self) -> int:
        """G."""
        return self.layer.num_groups if isinstance(self.layer, SharedSignals) else 1

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """A^{-1} G B^{-1}."""
        by_a, by_b = self.split(damping)
        if isinstance(gradient, Residual) and isinstance(self.layer, DenseSignals):
            half = self._solve_units(gradient, by_b) / self.layer.num_samples
            half = over_row_weights(self.layer, half)
            return (self.layer.update(self.left.solve_range(half, by_a)),)

        def group(left: Any, right: Factor, matrix: Array, by_a: Any, by_b: Any) -> Array:
            return right.solve(left.solve(matrix, by_a).T, by_b).T

        (g,) = gradient.vector((self.layer,))
        return (self.layer.update(self._over_groups(group, matrix_of(g), by_a, by_b)),)

    def _solve_units(self, residual: Residual, damping: Array | float) -> Array:
        """r^T D (B + rho)^{-1} sample by sample, shape (N, M)."""
        right, w = self.right, residual.coefficients
        flat = right.rows.array()
        if right.in_parameters or w is None:
            cotangent = residual.cotangent(self.layer, 0)
            return right.solve(cotangent.T, damping).T
        n, s = w.shape
        inverse = inverse_psd(right.system(damping), shifted=not is_zero(damping))
        rows = jnp.einsum("ns,nsm->nm", w, inverse.reshape(n, s, n * s))
        return right.divisor * rows @ flat

    def _over_groups(self, function: Callable[..., Array], matrix: Array, *whole: Any) -> Array:
        """A function of A, B and the part of (fan_in, M), group by group, and of other things."""
        if isinstance(self.layer, DenseSignals):
            return function(self.left, self.right, matrix, *whole)
        parts = (self.left, self.right, grouped(matrix, self.groups))
        return ungrouped(over_groups(lambda part, *whole: function(*part, *whole), parts, *whole))

    def cross(self, test: DenseSignals, damping: Array | float) -> Array:
        """J' (A (x) B)^{-1} J^T between samples, shape (N' S', N S), of a dense layer."""
        by_a, by_b = self.split(damping)
        units = self.right.cross(UnitRows(test), by_b)
        if isinstance(self.left.rows, InputRows):
            inputs = self.left.cross(InputRows(test), by_a)
        else:
            assert isinstance(self.layer, DenseSignals)
            inputs = self.left.cross(ArrayRows(test.augmented_inputs()), by_a)
            inputs = over_row_weights(self.layer, inputs.T).T
        return units * expand_samples(inputs, test.num_directions, self.layer.num_directions)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """A G B."""

        def group(left: Any, right: Factor, matrix: Array) -> Array:
            return right.matvec(left.matvec(matrix).T).T

        return (self.layer.update(self._over_groups(group, matrix_of(vector[0]))),)

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""

        def group(left: Any, right: Factor, matrix: Array) -> Array:
            del matrix
            return jnp.outer(left.diagonal(), right.diagonal())

        like = jnp.zeros((self.layer.fan_in, self.layer.num_units), self.layer.derivatives.dtype)
        return (self.layer.update(self._over_groups(group, like)),)

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        return jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in self.diagonal()[0].values()]))

    def eigenvalues(self) -> Array:
        """All products of an eigenvalue of A and one of B."""
        return jnp.concatenate(
            [
                jnp.outer(left.eigenvalues(), right.eigenvalues()).reshape(-1)
                for left, right in self._pairs()
            ]
        )

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """(A + rho_A)^(1/2) Z (B + rho_B)^(1/2) with Z standard normal."""
        by_a, by_b = self.split(damping)
        shape = (self.layer.fan_in, self.layer.num_units)
        draw = jax.random.normal(key, shape, self.layer.derivatives.dtype)

        def group(left: Any, right: Factor, matrix: Array, by_a: Any, by_b: Any) -> Array:
            return right.root_times(left.root_times(matrix, by_a).T, by_b).T

        return (self.layer.update(self._over_groups(group, draw, by_a, by_b)),)

    def logdet(self, damping: Array | float) -> Array:
        """M log det(A + rho_A) + K log det(B + rho_B)."""
        by_a, by_b = self.split(damping)
        units, fan_in = self.layer.num_units // self.groups, self.layer.fan_in
        return jnp.sum(
            jnp.stack(
                [
                    units * left.logdet(by_a) + fan_in * right.logdet(by_b)
                    for left, right in self._pairs()
                ]
            )
        )

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """See ``Operator.extremes``; of the damped product."""
        by_a, by_b = self.split(damping)
        pairs = [(a.extremes(by_a), b.extremes(by_b)) for a, b in self._pairs()]
        low = jnp.stack([a[0] * b[0] for a, b in pairs])
        return jnp.min(low), jnp.max(jnp.stack([a[1] * b[1] for a, b in pairs]))

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """(A + rho_A) (x) (B + rho_B), units of group after group within each input."""
        by_a, by_b = self.split(damping)
        blocks = [
            jnp.einsum("jk,im->jikm", left.to_dense(by_a), right.to_dense(by_b))
            for left, right in self._pairs()
        ]
        eye = jnp.eye(len(blocks), dtype=blocks[0].dtype)
        block = jnp.einsum("gjikm,gh->jgikhm", jnp.stack(blocks), eye)
        return block.reshape(self.layer.num_params, self.layer.num_params)

    def _pairs(self) -> list[tuple[Any, Factor]]:
        """A and B of every group."""
        if isinstance(self.layer, DenseSignals):
            return [(self.left, self.right)]
        both = (self.left, self.right)
        return [jax.tree.map(lambda leaf, g=g: leaf[g], both) for g in range(self.groups)]


def _factor(rows: Any, over: float | Array, space: Space, groups: int | None) -> Factor:
    """A factor with a divisor that may depend on the batch, for each group where there are some."""
    if not isinstance(over, Array):
        return Factor(rows, over, space)
    return Factor(rows, 1.0, space, over if groups is None else jnp.broadcast_to(over, groups))


def grouped(matrix: Array, groups: int) -> Array:
    """(K, g m) with units in groups as (g, K, m)."""
    return jnp.moveaxis(matrix.reshape(matrix.shape[0], groups, -1), 1, 0)


def ungrouped(matrices: Array) -> Array:
    """The inverse of ``grouped``."""
    g, k, m = matrices.shape
    return jnp.moveaxis(matrices, 0, 1).reshape(k, g * m)


def over_groups(function: Callable[..., Any], parts: Any, *whole: Any) -> Any:
    """A function of every group, one after the other; without a loop where there is but one.

    Args:
      function: of the part of a group, and of what all groups share; it closes over no arrays.
      parts: a pytree whose leaves have an axis of groups.
      whole: what all groups share.
    """
    if len(jax.tree.leaves(parts)[0]) == 1:
        first = function(jax.tree.map(lambda leaf: leaf[0], parts), *whole)
        return jax.tree.map(lambda leaf: leaf[None], first)

    def every(parts: Any, *whole: Any) -> Any:
        return jax.lax.map(lambda part: function(part, *whole), parts)

    return cubic(every, parts, *whole)
