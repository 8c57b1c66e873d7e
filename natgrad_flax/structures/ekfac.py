"""Eigenvalue-corrected Kronecker factors (EKFAC)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import per_layer
from natgrad_flax.linalg.dense import (
    eigh,
    qr,
    symmetric_product,
)
from natgrad_flax.linalg.execution import cubic
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.eigenbasis import Basis, Eigenbasis, invert_squares, solve_in_basis
from natgrad_flax.operators.kronecker import affine, factor_rows, over_groups
from natgrad_flax.operators.units import WholeUnits, invert_blocks, unit_blocks
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.lookup import LookupSignals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.exact import mean_diagonal
from natgrad_flax.structures.factor_entries import (
    apply_entries,
    factor_means,
    products_of_rows,
    together,
)
from natgrad_flax.structures.geometry import Geometry
from natgrad_flax.structures.kronecker_average import kronecker_words
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class EKFAC(AveragedStructure):
    """K-FAC's eigenbasis with the best diagonal in it (George et al. 2018, Proposition 2).

    G_l = (U_A (x) U_B) diag(S*) (U_A (x) U_B)^T + rho I, with U_A, U_B the eigenvectors of the
    Kronecker factors of K-FAC and S* = (1/N) sum_n sum_s (U_A^T J_ns U_B)^2 entry by entry, the
    second moments of the per-sample Jacobians in that basis. Of all matrices that are diagonal in
    it, this one is nearest to the Fisher block in Frobenius norm. For shared weights J_ns is the
    true Jacobian of the sample, summed over positions. Groups of units have a basis each.
    Parameters without Kronecker factors keep their exact Fisher block a unit. The basis of the
    rows of a table that are looked up (embeddings), whose A is a diagonal, is the standard one.
    Weights of two uses (tied embeddings) have the eigenvectors of the pair that ``KFAC`` makes of
    both, and J_ns is the sum over both.

    Where eigenvalues of a factor coincide its eigenvectors, and with them G, are not unique. The
    null space of a factor does no harm with "expand": there S* = 0 in every basis.

    Args:
      sharing: which factors weights have that several positions share, "expand" or "reduce", as
        for ``KFAC``. They give the basis only.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> loss = ng.MeanSquaredError()
      >>> step = ng.natural_gradient(
      ...     model, x, y, structure=ng.EKFAC(), loss=loss, damping=1e-3
      ... )
      >>> kept, F = (
      ...     ng.fisher(model, x, structure=s, loss=loss)
      ...     for s in (ng.EKFAC(), ng.Exact())
      ... )
      >>> bool(jnp.isclose(kept.trace(), F.trace()))  # those of K-FAC differ
      True
    """

    sharing: Sharing = "expand"
    style = styled("EKFAC", "#661100", "*", short="EKFAC")
    stacking = "all"
    eigensystems = True
    cheap_inverse = True
    shared_weights = "squares"
    damping_margin = 1.0  # no system is solved
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
            found.append(factor_means(affine(layer), self.sharing))
        return tuple(found)

    def basis(self, factors: tuple[dict[str, Array], ...]) -> tuple[dict[str, Array], ...]:
        """All eigenvectors of both factors, as columns."""
        return tuple(
            {
                name: over_groups(_eigenvectors, entry[name])
                for name in ("inputs", "units")
                if name in entry
            }
            for entry in map(together, factors)
        )

    def rotated(
        self, signals: Signals, basis: tuple[dict[str, Array], ...]
    ) -> tuple[dict[str, Array], ...]:
        """S* of every layer, (G, K, M/G) or one row and column for each vector of the basis."""
        return tuple(
            {"squares": _mean_squares(layer, entry)} if entry else {}
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
            blocks.append({})
            layer = affine(layer)
            if layer.has_diagonal_inputs(self.sharing):
                units = cast(LookupSignals, layer).unit_rows(self.sharing)
                basis.append({"units": _span(units, False)})
                continue
            left, right = factor_rows(layer, self.sharing)
            # the Jacobian of a sample lies in the span of its positions, but not of their mean
            whole = isinstance(layer, SharedSignals) and self.sharing == "reduce"
            basis.append({"inputs": _span(left, whole), "units": _span(right, whole)})
        return Moments(tuple(blocks), tuple(basis), self.rotated(signals, tuple(basis)))

    def operator(self, signals: Signals) -> Blocks:
        """The eigenbases of affine layers, the blocks of the units of others."""
        moments = self.moments(signals)
        return Blocks(
            tuple(
                Eigenbasis(layer, basis, rotated["squares"])  # type: ignore[arg-type]
                if basis
                else WholeUnits(layer, "parameter")
                for layer, basis, rotated in zip(
                    signals.layers, moments.basis, moments.rotated, strict=True
                )
            )
        )

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[dict[str, Any], ...]:
        """What ``solve_in_basis`` needs, or the inverses of blocks."""
        rhos = per_layer(damping, len(moments.factors))
        return tuple(
            {"blocks": invert_blocks(factors["blocks"], rho)}
            if "blocks" in factors
            else invert_squares(basis, rotated["squares"], rho)
            for factors, basis, rotated, rho in zip(*moments, rhos, strict=True)
        )

    def basis_of(self, inverse: tuple[dict[str, Any], ...]) -> tuple[dict[str, Array], ...]:
        """See ``AveragedStructure.basis_of``."""
        return tuple(
            {name: entry[name] for name in ("inputs", "units") if name in entry}
            for entry in inverse
        )

    def apply(
        self, inverse: tuple[dict[str, Any], ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """See ``AveragedStructure.apply``."""
        return apply_entries(inverse, gradient, solve_in_basis)

    def gram_size(self, signals: Signals) -> int:
        """The larger side of the two factors, or of the rows where these are fewer."""
        sides = [0]
        for layer in signals.layers:
            if isinstance(layer, ExplicitSignals):
                sides.append(layer.fan_in)
                continue
            samples, directions, groups = layer.num_samples, layer.num_directions, 1
            if isinstance(layer, SharedSignals):
                groups = layer.num_groups
                samples = samples * layer.num_positions
            by_directions = samples * directions
            left = by_directions if isinstance(layer, TiedSignals) else samples
            pairs = [(left, layer.fan_in), (by_directions, layer.num_units // groups)]
            pairs = pairs[affine(layer).has_diagonal_inputs(self.sharing) :]
            whole = isinstance(layer, SharedSignals) and self.sharing == "reduce"
            sides.extend(params if whole else min(rows, params) for rows, params in pairs)
        return max(sides)

    def system_arrays(self, signals: Signals) -> float:
        """Both factors of the layers at work, their eigenvectors and what is between."""
        return 8.0

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """``damping_scale`` from moments, (L,)."""
        scales = []
        for factors, basis, entry in zip(*moments, strict=True):
            if "blocks" in factors:
                trace = jnp.einsum("ikk->", factors["blocks"])
                count = int(np.prod(factors["blocks"].shape[:2]))
            else:
                trace = jnp.sum(entry["squares"])
                inputs = basis.get("inputs", entry["squares"]).shape[1]
                count = len(entry["squares"]) * inputs * basis["units"].shape[1]
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

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those of the layers' blocks, of which eigenvectors and scaling are stored."""
        stored = sum(k**2 + m**2 + k * m for k, m in geometry.layers)
        return sum(params**2 for params in geometry.params), stored

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        affine = not isinstance(layer, ExplicitSignals)
        return kronecker_words(layer, self.sharing) + " eigenbasis" * affine


def _eigenvectors(factor: Array) -> Array:
    return eigh(factor)[1]


def _span(rows: Array, whole: bool) -> Array:
    """Eigenvectors of rows^T rows for each group, (G, P, min(R, P)), for rows (G, R, P).

    With fewer rows than columns they come from a basis of the rows' span, and the null space is
    left out, unless the whole space is asked for.
    """
    if whole or rows.shape[1] >= rows.shape[2]:
        return over_groups(_eigenvectors, products_of_rows(rows))

    def group(part: Array) -> Array:
        # orthonormal to rounding whatever the rank of the rows, unlike rows^T times a scaling
        span, triangle = qr(part.T)
        return span @ _eigenvectors(symmetric_product(triangle))

    return over_groups(lambda part: cubic(group, part), rows)


def _mean_squares(layer: LayerSignals, basis: Basis) -> Array:
    """S* = (1/N) sum_n sum_s (U_A^T J_ns U_B)^2, shape (G, r, r').

    Args:
      layer: signals of an affine layer.
      basis: U_A and U_B of every group.
    """
    layer, right = affine(layer), basis["units"]
    n = layer.num_samples
    if isinstance(layer, TiedSignals):
        left = basis["inputs"][0] if "inputs" in basis else None
        return layer.in_basis(left, right[0]).squares()["kernel"][None] / n
    if "inputs" not in basis:
        rotated = dataclasses.replace(layer, derivatives=layer.derivatives @ right[0])
        return rotated.squares()["kernel"][None] / n
    left, inputs = basis["inputs"], layer.augmented_inputs()
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
    s, t = layer.num_directions, layer.num_positions
    (k, p), (m, q) = left.shape[1:], right.shape[1:]
    rows = t * k * p + s * t * (m * q + p * q)
    return rows < s * (t * k * m + p * k * m + p * m * q)
