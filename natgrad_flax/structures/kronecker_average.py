"""Kronecker factors as means over samples, which may run over batches."""

from __future__ import annotations

import abc
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero, of_block, per_layer
from natgrad_flax.operators.base import Blocks, Space, in_parameters
from natgrad_flax.operators.kronecker import (
    AffineSignals,
    Kronecker,
    affine,
    factor_rows,
)
from natgrad_flax.operators.units import WholeUnits, invert_blocks, unit_blocks
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.base import Structure, dense_layer, has_shared_layers, triangle
from natgrad_flax.structures.factor_entries import (
    Entry,
    apply_entries,
    factor_means,
    inputs_of,
    inverse_groups,
    invert_inputs,
    mean_diagonal,
    num_positions,
    solve_affine,
    together,
)
from natgrad_flax.structures.geometry import Geometry

Size = tuple[float, bool] | None
"""The fan-in of an affine layer, and whether positions share its weights; None of other layers."""

Scalings = list[tuple[float | Array, float | Array]]
"""By how much the divisors of A* and B* of every layer are larger than those of the means."""


class FactorAverage(AveragedStructure):
    """What is kept of a batch where layers have factors: means of A and B, or of blocks of units.

    An entry of an affine layer holds B as "units", and A as "inputs", as "shared" where positions
    share the weights, by the "rows" a / sqrt(N) that make it, or by its diagonal as "counts".
    Weights of two uses (``TiedSignals``) have both, for the second under "tied" names; they become
    one pair when they are solved with, so that what is averaged are means over samples.
    """

    sharing: Sharing
    space: Space

    @abc.abstractmethod
    def _kronecker(self, signals: Signals, index: int) -> Kronecker:
        """G of an affine layer."""

    def operator(self, signals: Signals) -> Blocks:
        """Kronecker products of affine layers, the blocks of the units of others."""
        return Blocks(
            tuple(
                WholeUnits(layer, self.space)
                if isinstance(layer, ExplicitSignals)
                else self._kronecker(signals, index)
                for index, layer in enumerate(signals.layers)
            )
        )

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_l (B(x',x) B^{-1}) . (A(x',x) A^{-1}), times N (Karakida & Osawa 2020, Eq. 21)."""
        if has_shared_layers(train):
            return super().coefficient(test, train, damping)
        return crossed(self.operator(train), test, train, damping)

    def statistics(self, signals: Signals) -> tuple[Entry, ...]:
        """Means of the factors, or of the blocks of units, and of the diagonals of their Grams."""
        return self._statistics(signals, rows=False)

    def latest(self, signals: Signals) -> tuple[Entry, ...]:
        """As ``statistics``, with the rows of A themselves where a layer has fewer than inputs."""
        return self._statistics(signals, rows=True)

    def _statistics(self, signals: Signals, *, rows: bool) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for layer in signals.layers:
            if isinstance(layer, ExplicitSignals):
                found.append({"blocks": unit_blocks(layer), "norms": self._gram_means(layer)})
                continue
            assert isinstance(layer, (DenseSignals, SharedSignals))
            if isinstance(layer, TiedSignals):
                found.append(self._of_both_uses(layer))
                continue
            norms = self._gram_means(layer)
            if rows and isinstance(layer, DenseSignals) and layer.num_samples < layer.fan_in:
                (a,), (d,) = factor_rows(layer, self.sharing)
                n = float(layer.num_samples)
                units = (d.T @ d)[None] / n
                found.append({"rows": a / jnp.sqrt(n), "units": units, "norms": norms})
                continue
            name = "shared" if isinstance(layer, SharedSignals) else "inputs"
            found.append({**factor_means(layer, self.sharing, name), "norms": norms})
        return tuple(found)

    def _of_both_uses(self, layer: TiedSignals) -> Entry:
        """Means of the factors of both uses, and over what the traces of their sum are "norms"."""
        positions = float(num_positions(layer, self.sharing))
        over = jnp.asarray([positions, positions * layer.num_directions], layer.derivatives.dtype)
        return {**factor_means(layer, self.sharing, "shared"), "norms": 1 / over}

    def _row_norms(self, layer: AffineSignals) -> tuple[Array, Array]:
        """Squared norms of the rows of both factors, of all groups together."""
        if isinstance(layer, SharedSignals):
            return layer.row_norms(self.sharing)
        norms = layer.input_norms()
        norms = norms if layer.row_weights is None else layer.row_weights * norms
        return jnp.sum(norms), jnp.sum(layer.derivative_norms())

    def _gram_means(self, layer: LayerSignals) -> Array:
        """Mean diagonals of the Gram matrices of the rows of both factors, of a over T, (2,).

        Of a layer that is not affine that of its Gram matrix, twice.
        """
        if isinstance(layer, ExplicitSignals):
            mean = jnp.sum(layer.gram_norms()) / float(layer.num_samples * layer.num_directions)
            return jnp.stack([mean, mean])
        layer = affine(layer)
        sum_a, sum_b = self._row_norms(layer)
        positions = num_positions(layer, self.sharing)
        groups = layer.num_groups if isinstance(layer, SharedSignals) else 1
        rows = float(layer.num_samples * positions * groups)
        # floats: products of sizes outgrow the integers of XLA
        return jnp.stack([sum_a / (rows * positions), sum_b / (rows * layer.num_directions)])

    def apply(
        self, inverse: tuple[Entry, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """A^{-1} G B^{-1}, group by group."""
        return apply_entries(inverse, gradient, solve_affine)


class KroneckerAverage(FactorAverage):
    """The product of both factors, as ``KFAC`` has it."""

    @abc.abstractmethod
    def _scalings(self, sizes: list[Size], num_samples: int | Array) -> Scalings:
        """Of all layers, 1 where a layer is not affine."""

    @abc.abstractmethod
    def _split(
        self, damping: Array | float, mean_a: Array, mean_b: Array
    ) -> tuple[Array | float, Array | float]:
        """What is added to A* and to B*, from their mean diagonals."""

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[Entry, ...]:
        """The inverses of both factors, or of the blocks of units."""
        factors = tuple(map(together, moments.factors))
        scalings, rhos = self._scalings_of(factors, num_samples), per_layer(damping, len(factors))
        shifted = not is_zero(damping)
        found: list[Entry] = []
        for entry, rho, (by_a, by_b) in zip(factors, rhos, scalings, strict=True):
            if "blocks" in entry:
                found.append({"blocks": invert_blocks(entry["blocks"], of_block(rho))})
                continue
            inputs, b = inputs_of(entry), entry["units"] / by_b
            if "rows" in entry:
                a = inputs / jnp.sqrt(by_a)
                mean_a = jnp.sum(a**2) / float(inputs.shape[-1])
            else:
                a = inputs / by_a
                mean_a = jnp.mean(a) if "counts" in entry else mean_diagonal(a)
            rho_a, rho_b = self._split(rho, mean_a, mean_diagonal(b))
            units = inverse_groups(b, rho_b, shifted=shifted)
            found.append({"units": units, **invert_inputs(entry, a, rho_a, shifted=shifted)})
        return tuple(found)

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """``damping_scale`` from moments, (L, 2)."""
        factors = tuple(map(together, moments.factors))
        scalings = self._scalings_of(factors, num_samples)
        return scaled_norms([entry["norms"] for entry in factors], scalings, num_samples)

    def _scalings_of(self, factors: tuple[Entry, ...], num_samples: int | Array) -> Scalings:
        sizes: list[Size] = [
            None
            if "blocks" in entry
            else (inputs_of(entry).shape[-1], "shared" in entry or "counts" in entry)
            for entry in factors
        ]
        if isinstance(num_samples, Array):
            num_samples = num_samples.astype(jax.tree.leaves(factors)[0].dtype)
        return self._scalings(sizes, num_samples)


class OfMatrices(Structure):
    """What structures cost whose factors are whole matrices, by their eigenvectors."""

    eigensystems = True

    def gram_size(self, signals: Signals) -> int:
        """The larger of fan-in and units of a group."""
        return max(
            max(layer.fan_in, layer.num_units // getattr(layer, "num_groups", 1))
            for layer in signals.layers
        )

    def system_arrays(self, signals: Signals) -> float:
        """Both matrices of the layers at work, their eigenvectors and what is between."""
        return 8.0

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those of the layers' blocks, of which the factors are stored."""
        return kronecker_entries(geometry)


def crossed(operator: Blocks, test: Signals, train: Signals, damping: Array | float) -> Array:
    """sum_l J_l' G_l^{-1} J_l^T / N of dense layers by their factors; see ``coefficient``."""
    total = jnp.zeros((), train.outputs.dtype)
    rhos = per_layer(damping, len(train.layers))
    for block, layer, rho in zip(operator.blocks, map(dense_layer, test.layers), rhos, strict=True):
        total = total + cast(Kronecker, block).cross(layer, rho) / train.num_samples
    return total


def scaled_norms(norms: list[Array], scalings: Scalings, num_samples: int | Array) -> Array:
    """Mean diagonals of Gram matrices, (2,) a layer, over N and the scalings of both factors."""
    means = jnp.stack(norms)
    over = jnp.stack([jnp.asarray(by, means.dtype) for pair in scalings for by in pair])
    return means / (num_samples * over.reshape(means.shape))


def factor_sides(layer: LayerSignals, sharing: Sharing, space: Space) -> tuple[int, int]:
    """The sides of the systems of A and of B; 0 where A is a diagonal.

    Of a layer that is not affine that of the blocks of its units, twice.
    """
    samples = layer.num_samples
    rows = samples * layer.num_directions
    if isinstance(layer, ExplicitSignals):
        side = layer.fan_in if in_parameters(space, rows, layer.fan_in) else rows
        return side, side
    layer = affine(layer)
    positions = num_positions(layer, sharing)
    # of the transposed use the rows of A are derivatives
    inputs = rows if isinstance(layer, TiedSignals) else samples
    pairs = ((positions * inputs, layer.fan_in), (positions * rows, layer.num_units))
    left, right = (
        params if in_parameters(space, count, params) else count for count, params in pairs
    )
    return 0 if layer.has_diagonal_inputs(sharing) else left, right


def kronecker_entries(geometry: Geometry) -> tuple[int, int]:
    """Entries of the layers' blocks, of which two factors are stored; see ``Structure.entries``."""
    stored = sum(triangle(fan_in) + triangle(units) for fan_in, units in geometry.layers)
    return sum(params**2 for params in geometry.params), stored


def no_shared_limit(name: str) -> str:
    """Why factors of shared weights have no limit, and what to do."""
    return (
        f"{name} has no infinite-width kernel of a ConvNet here: the factors of shared weights are "
        "Gram matrices over samples and positions, which the kernels of the layers do not hold; "
        'use kernels="empirical"'
    )


def kronecker_words(layer: LayerSignals, sharing: Sharing) -> str:
    """What becomes of the Fisher block of a layer, in words."""
    if isinstance(layer, ExplicitSignals):
        return "exact block a unit"
    if isinstance(layer, TiedSignals):
        return f"Kronecker of both uses, {sharing}"
    return f"Kronecker, {sharing}" if isinstance(layer, SharedSignals) else "Kronecker"
