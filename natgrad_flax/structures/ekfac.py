"""Eigenvalue-corrected Kronecker factors (EKFAC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.layer_signals import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.linalg import (
    above_rounding,
    add_diagonal,
    eigh,
    qr,
    rank_cutoff,
    reciprocal,
    symmetric_product,
)
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.signals import DenseSignals, Residual, Signals
from natgrad_flax.structures.averaged import AveragedStructure, Moments, update_like
from natgrad_flax.structures.base import Geometry, ravel
from natgrad_flax.structures.exact import mean_diagonal
from natgrad_flax.structures.kronecker import (
    factor_means,
    factor_rows,
    grouped,
    kronecker_words,
    over_groups,
    ungrouped,
)
from natgrad_flax.structures.units import invert_blocks, multiply_blocks, unit_blocks


@dataclass(frozen=True)
class EKFAC(AveragedStructure):
    """K-FAC's eigenbasis with the best diagonal in it (George et al. 2018, Proposition 2).

    G_l = (U_A (x) U_B) diag(S*) (U_A (x) U_B)^T + rho I, with U_A, U_B the eigenvectors of the
    Kronecker factors of K-FAC and S* = (1/N) sum_n sum_s (U_A^T J_ns U_B)^2 entry by entry, the
    second moments of the per-sample Jacobians in that basis. Of all matrices that are diagonal in
    it, this one is nearest to the Fisher block in Frobenius norm. For shared weights J_ns is the
    true Jacobian of the sample, summed over positions. Groups of units have a basis each.
    Parameters without Kronecker factors keep their exact Fisher block a unit.

    Where eigenvalues of a factor coincide its eigenvectors, and with them G, are not unique. The
    null space of a factor does no harm with "expand": there S* = 0 in every basis.

    Args:
      sharing: which factors weights have that several positions share, "expand" or "reduce", as
        for ``KFAC``. They give the basis only.
    """

    sharing: Sharing = "expand"
    cheap_inverse = True
    has_basis = True

    def __post_init__(self) -> None:
        if self.sharing not in get_args(Sharing):
            raise ValueError(f"sharing must be one of {get_args(Sharing)}, got {self.sharing!r}")

    def statistics(self, signals: Signals) -> tuple[dict[str, Array], ...]:
        """Means of the factors, or of the blocks of units."""
        found = []
        for layer in signals.layers:
            if isinstance(layer, ExplicitSignals):
                found.append({"blocks": unit_blocks(layer)})
                continue
            assert isinstance(layer, (DenseSignals, SharedSignals))
            inputs, units = factor_means(layer, self.sharing)
            found.append({"inputs": inputs, "units": units})
        return tuple(found)

    def basis(self, factors: tuple[dict[str, Array], ...]) -> tuple[dict[str, Array], ...]:
        """All eigenvectors of both factors, as columns."""
        return tuple(
            {
                name: over_groups(_eigenvectors, entry[name])
                for name in ("inputs", "units")
                if name in entry
            }
            for entry in factors
        )

    def rotated(
        self, signals: Signals, basis: tuple[dict[str, Array], ...]
    ) -> tuple[dict[str, Array], ...]:
        """S* of every layer, (G, K, M/G) or one row and column for each vector of the basis."""
        return tuple(
            {"squares": _mean_squares(layer, entry["inputs"], entry["units"])} if entry else {}
            for layer, entry in zip(signals.layers, basis, strict=True)
        )

    def moments(self, signals: Signals) -> Moments:
        """As for every structure, but the basis is no larger than what the rows span."""
        basis: list[dict[str, Array]] = []
        blocks: list[dict[str, Array]] = []
        for layer in signals.layers:
            if isinstance(layer, ExplicitSignals):
                blocks.append({"blocks": unit_blocks(layer)})
                basis.append({})
                continue
            assert isinstance(layer, (DenseSignals, SharedSignals))
            blocks.append({})
            left, right = factor_rows(layer, self.sharing)
            # the Jacobian of a sample lies in the span of its positions, but not of their mean
            whole = isinstance(layer, SharedSignals) and self.sharing == "reduce"
            basis.append({"inputs": _span(left, whole), "units": _span(right, whole)})
        return Moments(tuple(blocks), tuple(basis), self.rotated(signals, tuple(basis)))

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int
    ) -> tuple[dict[str, Any], ...]:
        """The basis with 1 / (S* + rho) in it and 1 / rho outside; or the inverses of blocks."""
        found = []
        rhos = per_layer(damping, len(moments.factors))
        for factors, basis, entry, rho in zip(
            moments.factors, moments.basis, moments.rotated, rhos, strict=True
        ):
            if "blocks" in factors:
                found.append({"blocks": invert_blocks(factors["blocks"], rho)})
                continue
            squares = entry["squares"]
            inverse = _reciprocal(squares, rho)
            found.append({**basis, "inverse": inverse, "outside": _outside(rho, squares.dtype)})
        return tuple(found)

    def apply(
        self, inverse: tuple[dict[str, Any], ...], slope: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """Into the basis, over S* + rho, and back; what lies outside of it over rho."""
        updates = []
        for entry, g in zip(inverse, slope, strict=True):
            matrix = matrix_of(g)
            if "blocks" in entry:
                updates.append(update_like(g, multiply_blocks(entry["blocks"], matrix)))
                continue
            left = entry["inputs"]
            parts = grouped(matrix, len(left))
            half = left.mT @ parts
            solved = left @ _solve_units(entry, half)
            if _is_thin(left):
                solved = solved + entry["outside"] * (parts - left @ half)
            updates.append(update_like(g, ungrouped(solved)))
        return tuple(updates)

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``.

        The gradient of the batch lies in the span of its inputs and, where r lies in the span of
        the seeds, of its derivatives. What it has outside is rounding, which a division by rho
        would magnify; so only its coordinates in the basis are taken.
        """
        inverse = self.invert(self.moments(signals), damping, signals.num_samples)
        updates = []
        for index, (layer, entry) in enumerate(zip(signals.layers, inverse, strict=True)):
            direction = residual.direction(layer, index) / signals.num_samples
            if "blocks" in entry:
                slope = matrix_of(layer.pull_back(direction))
                updates.append(layer.update(multiply_blocks(entry["blocks"], slope)))
                continue
            half = _turned_gradient(layer, direction, entry["inputs"])
            seen = None
            if residual.coefficients is not None:
                seen = _seen_units(layer, entry["units"])
            solved = entry["inputs"] @ _solve_units(entry, half, seen)
            updates.append(layer.update(ungrouped(solved)))
        return tuple(updates)

    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.precondition``."""
        inverse = self.invert(self.moments(signals), damping, signals.num_samples)
        return self.apply(inverse, slope)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """J' (G^{-1} J^T) / N, column by column with one eigenbasis for all of them."""
        inverse = self.invert(self.moments(train), damping, train.num_samples)

        def column(row: Array) -> Array:
            return ravel(self.apply(inverse, train.unravel(row)))

        columns = jax.lax.map(column, train.to_dense())
        return test.to_dense() @ columns.T / train.num_samples

    def to_dense(self, signals: Signals, damping: Array | float = 0.0) -> Array:
        """Block-diagonal over layers, and over groups and units."""
        dense = []
        moments, rhos = self.moments(signals), per_layer(damping, len(signals.layers))
        for layer, factors, basis, entry, rho in zip(
            signals.layers, moments.factors, moments.basis, moments.rotated, rhos, strict=True
        ):
            if "blocks" in factors:
                eye = jnp.eye(layer.num_units, dtype=factors["blocks"].dtype)
                block = jnp.einsum("ikj,im->kijm", factors["blocks"], eye)
            else:
                vectors = jnp.einsum("gkp,gmq->gkmpq", basis["inputs"], basis["units"])
                squares = entry["squares"]
                eye = jnp.eye(len(squares), dtype=squares.dtype)
                # units of group after group within each input
                block = jnp.einsum("gkmpq,gpq,gjnpq,gh->kgmjhn", vectors, squares, vectors, eye)
            block = block.reshape(layer.num_params, layer.num_params)
            dense.append(add_diagonal(block, rho))
        return jax.scipy.linalg.block_diag(*dense)

    def gram_size(self, signals: Signals) -> int:
        """The larger side of the two factors, or of the rows where these are fewer."""
        sides = [0]
        for layer in signals.layers:
            if isinstance(layer, ExplicitSignals):
                sides.append(layer.fan_in)
                continue
            samples, seeds, groups = layer.num_samples, layer.num_seeds, 1
            if isinstance(layer, SharedSignals):
                groups = layer.num_groups
                samples = samples * layer.num_positions
            pairs = (samples, layer.fan_in), (samples * seeds, layer.num_units // groups)
            whole = isinstance(layer, SharedSignals) and self.sharing == "reduce"
            sides.extend(params if whole else min(rows, params) for rows, params in pairs)
        return max(sides)

    def scale_of(self, moments: Moments, num_samples: int) -> Array:
        """``damping_scale`` from moments, (L,)."""
        scales = []
        for factors, basis, entry in zip(*moments, strict=True):
            if "blocks" in factors:
                trace = jnp.einsum("ikk->", factors["blocks"])
                count = int(np.prod(factors["blocks"].shape[:2]))
            else:
                trace = jnp.sum(entry["squares"])
                sides = [basis[name].shape[1] for name in ("inputs", "units")]
                count = len(entry["squares"]) * int(np.prod(sides))
            scales.append(trace / float(count))
        return jnp.stack(scales)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean of the diagonal of F, which no rotation changes, one value a layer."""
        return mean_diagonal(signals)

    def alpha(self, geometry: Geometry) -> float:
        """Raises ValueError: sizes do not tell."""
        raise ValueError(
            "EKFAC has no alpha: Karakida & Osawa (2020) show no isotropy of it, so sizes alone "
            "give no learning rate; pass inputs as x= for 1 / lambda_max of its coefficient matrix"
        )

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """None: nothing is assumed."""
        return []

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those of the layers' blocks, of which eigenvectors and scaling are stored."""
        stored = sum(k**2 + m**2 + k * m for k, m in geometry.layers)
        return sum(params**2 for params in geometry.params), stored

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        affine = not isinstance(layer, ExplicitSignals)
        return kronecker_words(layer, self.sharing) + " eigenbasis" * affine


def _is_thin(basis: Array) -> bool:
    """Whether a basis (G, P, r) leaves something out."""
    return basis.shape[2] < basis.shape[1]


def _solve_units(entry: dict[str, Any], half: Array, seen: Array | float | None = None) -> Array:
    """G^{-1} g of what has been turned into the basis of the inputs, (G, r, M/G), and stays there.

    Args:
      entry: of ``EKFAC.invert``.
      half: U_A^T g.
      seen: 1 for the vectors of the basis of the units that g has a part in, and 0 for the others,
        where g is in their span; else None.
    """
    right = entry["units"]
    inside = half @ right
    if seen is not None:
        return (entry["inverse"] * inside * seen) @ right.mT
    solved = (entry["inverse"] * inside) @ right.mT
    if _is_thin(right):
        solved = solved + entry["outside"] * (half - inside @ right.mT)
    return solved


def _turned_gradient(layer: LayerSignals, direction: Array, left: Array) -> Array:
    """U_A^T a^T R, (G, r, M/G), for cotangents R of the pre-activations; 0 where a U_A is."""
    assert isinstance(layer, (DenseSignals, SharedSignals))
    if isinstance(layer, DenseSignals):
        turned = layer.augmented_inputs() @ left[0]
        return ((turned * _seen(turned)).T @ direction)[None]
    if _is_thin(left):
        turned = jnp.einsum("ntgk,gkp->ntgp", layer.augmented_inputs(), left)
        return jnp.einsum("ntgp,ntgm->gpm", turned, direction)
    # many rows: rather turn their sum
    return left.mT @ grouped(matrix_of(layer.pull_back(direction)), len(left))


def _seen_units(layer: LayerSignals, right: Array) -> Array:
    """1 for the vectors of U_B that the derivatives have a part in, 0 where it is rounding."""
    if not isinstance(layer, DenseSignals):
        return jnp.ones((), right.dtype)
    return _seen(layer.flat_derivatives() @ right[0])


def _seen(turned: Array) -> Array:
    """1 for columns (R, r) that are more than the rounding of the largest, else 0."""
    norms = jnp.sqrt(jnp.sum(turned**2, axis=0))
    return (above_rounding(norms) != 0).astype(turned.dtype)


def _eigenvectors(factor: Array) -> Array:
    return eigh(factor)[1]


def _span(rows: Array, whole: bool) -> Array:
    """Eigenvectors of rows^T rows for each group, (G, P, min(R, P)), for rows (G, R, P).

    With fewer rows than columns they come from a basis of the rows' span, and the null space is
    left out, unless the whole space is asked for.
    """

    def group(part: Array) -> Array:
        if whole or part.shape[0] >= part.shape[1]:
            return _eigenvectors(symmetric_product(part.T))
        # orthonormal to rounding whatever the rank of the rows, unlike rows^T times a scaling
        span, triangle = qr(part.T)
        return span @ _eigenvectors(symmetric_product(triangle))

    return over_groups(group, rows)


def _mean_squares(layer: LayerSignals, left: Array, right: Array) -> Array:
    """S* = (1/N) sum_n sum_s (U_A^T J_ns U_B)^2, shape (G, r, r').

    Args:
      layer: signals of an affine layer.
      left: U_A of every group, shape (G, K, r).
      right: U_B of every group, shape (G, M/G, r').
    """
    assert isinstance(layer, (DenseSignals, SharedSignals))
    n, inputs = layer.num_samples, layer.augmented_inputs()
    if isinstance(layer, DenseSignals):
        turned = (inputs @ left[0]) ** 2
        squares = jnp.sum((layer.derivatives @ right[0]) ** 2, axis=1)
        return (turned.T @ squares / n)[None]
    if _turns_rows(layer, left, right):
        a = jnp.einsum("ntgk,gkp->ntgp", inputs, left)
        d = jnp.einsum("nstgm,gmq->nstgq", layer.derivatives, right)
        jacobian = jnp.einsum("ntgp,nstgq->nsgpq", a, d)
    else:
        jacobian = jnp.einsum("ntgk,nstgm->nsgkm", inputs, layer.derivatives)
        jacobian = left.mT @ jacobian @ right
    return jnp.sum(jacobian**2, axis=(0, 1)) / n


def _turns_rows(layer: SharedSignals, left: Array, right: Array) -> bool:
    """Whether turning inputs and derivatives costs less than turning the Jacobians of samples."""
    s, t = layer.num_seeds, layer.num_positions
    (k, p), (m, q) = left.shape[1:], right.shape[1:]
    rows = t * k * p + s * t * (m * q + p * q)
    return rows < s * (t * k * m + p * k * m + p * m * q)


def _reciprocal(squares: Array, rho: Array | float) -> Array:
    """1 / (S* + rho); at the number 0 a pseudo-inverse with the cutoff of ``linalg.pinv_solve``."""
    if not is_zero(rho):
        return reciprocal(squares + rho)
    cutoff = rank_cutoff(max(squares.shape[1:]), squares.dtype)
    top = jnp.max(squares, axis=(1, 2), keepdims=True)
    return reciprocal(jnp.where(squares > cutoff * top, squares, 0))


def _outside(rho: Array | float, dtype: Any) -> Array:
    """The inverse of G where no sample has anything: 1 / rho, or 0 at 0."""
    return reciprocal(jnp.asarray(rho, dtype))
