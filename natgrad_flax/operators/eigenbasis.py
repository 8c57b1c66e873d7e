"""A diagonal in the basis of two orthogonal matrices, for each group of units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import above_rounding, add_diagonal, rank_cutoff, reciprocal
from natgrad_flax.linalg.execution import product
from natgrad_flax.operators.base import OfLayer, add, noise
from natgrad_flax.operators.kronecker import AffineSignals, grouped, ungrouped
from natgrad_flax.signals.base import LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.signals.tied import TiedSignals

Basis = dict[str, Array]
"""U_A as "inputs", (G, fan_in, r), absent where it is the identity, and U_B as "units",
(G, M/G, r')."""


@dataclass(frozen=True)
class Eigenbasis(OfLayer):
    """(U_A (x) U_B) diag(S) (U_A (x) U_B)^T of an affine layer, for each group of units.

    Attributes:
      layer: the signals.
      basis: U_A and U_B, whose columns need not span the whole space: the rest counts as zero.
      squares: S, shape (G, r, r').
    """

    layer: AffineSignals
    basis: Basis
    squares: Array

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``.

        The gradient of the batch lies in the span of its inputs and, where r lies in the span of
        the output directions, of its derivatives. What it has outside is rounding, which a division
        by rho would magnify; so only its coordinates in the basis are taken.
        """
        inverse = invert_squares(self.basis, self.squares, damping)
        if not isinstance(gradient, Residual):
            (g,) = gradient.vector((self.layer,))
            return (self.layer.update(solve_in_basis(inverse, matrix_of(g))),)
        cotangent = gradient.cotangent(self.layer, 0) / self.layer.num_samples
        half = _turned_gradient(self.layer, cotangent, self.basis)
        seen = None
        if gradient.coefficients is not None:
            seen = _seen_units(self.layer, self.basis["units"])
        solved = _from_basis(self.basis, _solve_units(inverse, half, seen))
        return (self.layer.update(ungrouped(solved)),)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """Into the basis, times S, and back."""
        right = self.basis["units"]
        parts = grouped(matrix_of(vector[0]), len(right))
        seen = self.squares * (_into_basis(self.basis, parts) @ right)
        moved = _from_basis(self.basis, seen) @ right.mT
        return (self.layer.update(ungrouped(moved)),)

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""
        squares = jax.tree.map(jnp.square, self.basis)
        moved = _from_basis(squares, self.squares) @ squares["units"].mT
        return (self.layer.update(ungrouped(moved)),)

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        return jnp.sum(self.squares)

    def eigenvalues(self) -> Array:
        """S."""
        return self.squares.reshape(-1)

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.sample``."""
        keys, squares = jax.random.split(key), self.squares
        draw = jnp.sqrt(squares) * jax.random.normal(keys[0], squares.shape, squares.dtype)
        moved = _from_basis(self.basis, draw) @ self.basis["units"].mT
        seen = (self.layer.update(ungrouped(moved)),)
        return add(seen, noise(keys[1], (self.layer,), damping))

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """Units of group after group within each input."""
        right = self.basis["units"]
        left = self.basis.get("inputs", jnp.eye(self.layer.fan_in, dtype=right.dtype)[None])
        vectors = jnp.einsum("gkp,gmq->gkmpq", left, right)
        eye = jnp.eye(len(left), dtype=self.squares.dtype)
        block = jnp.einsum("gkmpq,gpq,gjnpq,gh->kgmjhn", vectors, self.squares, vectors, eye)
        params = self.layer.num_params
        return add_diagonal(block.reshape(params, params), damping)


def invert_squares(basis: Basis, squares: Array, damping: Array | float) -> dict[str, Any]:
    """The basis, with 1 / (S + rho) in it as "inverse" and 1 / rho "outside"."""
    inverse = _reciprocal(squares, damping)
    return {**basis, "inverse": inverse, "outside": _outside(damping, squares.dtype)}


def solve_in_basis(inverse: dict[str, Any], matrix: Array) -> Array:
    """Into the basis, over S + rho, and back; what lies outside of it over rho.

    Args:
      inverse: of ``invert_squares``.
      matrix: g, shape (fan_in, M).
    """
    parts = grouped(matrix, len(inverse["units"]))
    half = _into_basis(inverse, parts)
    solved = _from_basis(inverse, _solve_units(inverse, half))
    if "inputs" in inverse and _is_thin(inverse["inputs"]):
        solved = solved + inverse["outside"] * (parts - _from_basis(inverse, half))
    return ungrouped(solved)


def _into_basis(basis: Basis, parts: Array) -> Array:
    """U_A^T G for G (G, fan_in, k)."""
    return product(basis["inputs"].mT, parts) if "inputs" in basis else parts


def _from_basis(basis: Basis, parts: Array) -> Array:
    """U_A G for G (G, r, k)."""
    return product(basis["inputs"], parts) if "inputs" in basis else parts


def _solve_units(entry: dict[str, Any], half: Array, seen: Array | float | None = None) -> Array:
    """G^{-1} g of what has been turned into the basis of the inputs, (G, r, M/G), and stays there.

    Args:
      entry: of ``invert_squares``.
      half: U_A^T g.
      seen: 1 for the vectors of the basis of the units that g has a part in, and 0 for the others,
        where g is in their span; else None.
    """
    right = entry["units"]
    inside = product(half, right)
    if seen is not None:
        return product(entry["inverse"] * inside * seen, right.mT)
    solved = product(entry["inverse"] * inside, right.mT)
    if _is_thin(right):
        solved = solved + entry["outside"] * (half - product(inside, right.mT))
    return solved


def _is_thin(basis: Array) -> bool:
    """Whether a basis (G, P, r) leaves something out."""
    return basis.shape[2] < basis.shape[1]


def _turned_gradient(layer: AffineSignals, cotangent: Array, basis: Basis) -> Array:
    """U_A^T a^T R, (G, r, M/G), for cotangents R of the pre-activations; 0 where a U_A is."""
    left = basis.get("inputs")
    if left is None:
        return grouped(matrix_of(layer.local_vjp(cotangent)), 1)
    if isinstance(layer, DenseSignals):
        turned = layer.augmented_inputs() @ left[0]
        return ((turned * _seen(turned)).T @ cotangent)[None]
    if _is_thin(left) and not isinstance(layer, TiedSignals):
        turned = jnp.einsum("ntgk,gkp->ntgp", layer.augmented_inputs(), left)
        return jnp.einsum("ntgp,ntgm->gpm", turned, cotangent)
    # many rows: rather turn their sum
    return left.mT @ grouped(matrix_of(layer.local_vjp(cotangent)), len(left))


def _seen_units(layer: AffineSignals, right: Array) -> Array:
    """1 for the vectors of U_B that the derivatives have a part in, 0 where it is rounding."""
    if not isinstance(layer, DenseSignals):
        return jnp.ones((), right.dtype)
    return _seen(layer.flat_derivatives() @ right[0])


def _seen(turned: Array) -> Array:
    """1 for columns (R, r) that are more than the rounding of the largest, else 0."""
    norms = jnp.sqrt(jnp.sum(turned**2, axis=0))
    return (above_rounding(norms) != 0).astype(turned.dtype)


def _reciprocal(squares: Array, rho: Array | float) -> Array:
    """1 / (S* + rho); at the number 0 a pseudo-inverse.

    A vector of either basis counts as one of the null space where its share of the trace is below
    the cutoff of ``linalg.pinv_solve``. An entry between two others does not, however small it is:
    it is a product of two significant eigenvalues.
    """
    if not is_zero(rho):
        return reciprocal(squares + rho)
    for axis in (1, 2):
        shares = jnp.sum(squares, axis=axis, keepdims=True)
        cutoff = rank_cutoff(shares.size // len(shares), squares.dtype)
        squares = jnp.where(shares > cutoff * jnp.max(shares, (1, 2), keepdims=True), squares, 0)
    return reciprocal(squares)


def _outside(rho: Array | float, dtype: Any) -> Array:
    """The inverse of G where no sample has anything: 1 / rho, or 0 at 0."""
    return reciprocal(jnp.asarray(rho, dtype))
