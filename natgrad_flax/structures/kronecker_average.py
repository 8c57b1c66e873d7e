"""Kronecker factors as means over samples, which may run over batches."""

from __future__ import annotations

import abc

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero, of_block, per_layer
from natgrad_flax.linalg import add_diagonal, inverse_psd, symmetric_product
from natgrad_flax.operators.kronecker import (
    AffineSignals,
    factor_rows,
    grouped,
    over_groups,
    ungrouped,
)
from natgrad_flax.operators.units import invert_blocks, multiply_blocks, unit_blocks
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.structures.averaged import AveragedStructure, Moments, update_like

Entry = dict[str, Array]


class KroneckerAverage(AveragedStructure):
    """What ``KFAC`` keeps of a batch: means of A and B, or of the blocks of units.

    An entry of an affine layer holds B as "units", and A as "inputs", as "shared" where positions
    share the weights, or by the "rows" a / sqrt(N) that make it.
    """

    sharing: Sharing

    @abc.abstractmethod
    def _scalings(
        self, index: int, last: int, fan_in: int, shared: bool, num_samples: int
    ) -> tuple[float, float]:
        """By how much the divisors of A* and B* are larger than those of the means."""

    @abc.abstractmethod
    def _split(
        self, damping: Array | float, mean_a: Array, mean_b: Array
    ) -> tuple[Array | float, Array | float]:
        """What is added to A* and to B*, from their mean diagonals."""

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
                found.append({"blocks": unit_blocks(layer), "norms": block_norms(layer)})
                continue
            assert isinstance(layer, (DenseSignals, SharedSignals))
            norms = self._gram_means(layer)
            if rows and isinstance(layer, DenseSignals) and layer.num_samples < layer.fan_in:
                (a,), (d,) = factor_rows(layer, self.sharing)
                n = float(layer.num_samples)
                units = symmetric_product(d.T)[None] / n
                found.append({"rows": a / jnp.sqrt(n), "units": units, "norms": norms})
                continue
            inputs, units = factor_means(layer, self.sharing)
            name = "shared" if isinstance(layer, SharedSignals) else "inputs"
            found.append({name: inputs, "units": units, "norms": norms})
        return tuple(found)

    def _row_norms(self, layer: AffineSignals) -> tuple[Array, Array]:
        """Squared norms of the rows of both factors, of all groups together."""
        if isinstance(layer, SharedSignals):
            left, right = layer.rows(self.sharing)
            return jnp.sum(left**2), jnp.sum(right**2)
        return jnp.sum(layer.input_norms()), jnp.sum(layer.derivative_norms())

    def _gram_means(self, layer: AffineSignals) -> Array:
        """Mean diagonals of the Gram matrices of the rows of both factors, of a over T, (2,)."""
        sum_a, sum_b = self._row_norms(layer)
        positions = num_positions(layer, self.sharing)
        groups = layer.num_groups if isinstance(layer, SharedSignals) else 1
        rows = float(layer.num_samples * positions * groups)
        # floats: products of sizes outgrow the integers of XLA
        return jnp.stack([sum_a / (rows * positions), sum_b / (rows * layer.num_directions)])

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int
    ) -> tuple[Entry, ...]:
        """The inverses of both factors, or of the blocks of units."""
        factors = moments.factors
        last, shifted = _last(factors), not is_zero(damping)
        found: list[Entry] = []
        for index, (entry, rho) in enumerate(
            zip(factors, per_layer(damping, len(factors)), strict=True)
        ):
            if "blocks" in entry:
                found.append({"blocks": invert_blocks(entry["blocks"], of_block(rho))})
                continue
            inputs = _inputs(entry)
            fan_in = inputs.shape[-1]
            by_a, by_b = self._scalings(index, last, fan_in, "shared" in entry, num_samples)
            b = entry["units"] / by_b
            if "rows" in entry:
                rows = inputs / jnp.sqrt(by_a)
                mean_a = jnp.sum(rows**2) / float(fan_in)
            else:
                a = inputs / by_a
                mean_a = _mean_diagonal(a)
            rho_a, rho_b = self._split(rho, mean_a, _mean_diagonal(b))
            units = inverse_groups(b, rho_b, shifted=shifted)
            if "rows" in entry:
                found.append({"units": units, **_invert_rows(rows, rho_a, shifted)})
            else:
                found.append({"units": units, "inputs": inverse_groups(a, rho_a, shifted=shifted)})
        return tuple(found)

    def apply(
        self, inverse: tuple[Entry, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """A^{-1} G B^{-1}, group by group."""
        updates = []
        for entry, g in zip(inverse, gradient, strict=True):
            matrix = matrix_of(g)
            if "blocks" in entry:
                updates.append(update_like(g, multiply_blocks(entry["blocks"], matrix)))
                continue
            parts = grouped(matrix, len(entry["units"]))
            if "rows" in entry:
                rows = entry["rows"]
                inside = rows.T @ (entry["core"] @ (rows @ parts))
                half = entry["outside"] * parts - inside
            else:
                half = entry["inputs"] @ parts
            updates.append(update_like(g, ungrouped(half @ entry["units"])))
        return tuple(updates)

    def scale_of(self, moments: Moments, num_samples: int) -> Array:
        """``damping_scale`` from moments, (L, 2)."""
        scales, factors = [], moments.factors
        for index, entry in enumerate(factors):
            if "blocks" in entry:
                scales.append(entry["norms"] / num_samples)
                continue
            last, fan_in = _last(factors), _inputs(entry).shape[-1]
            scalings = self._scalings(index, last, fan_in, "shared" in entry, num_samples)
            scales.append(scaled_norms(entry["norms"], num_samples, scalings))
        return jnp.stack(scales)


def block_norms(layer: ExplicitSignals) -> Array:
    """The mean diagonal of the Gram matrix, in both places of a pair."""
    mean = jnp.sum(layer.gram_norms()) / float(layer.num_samples * layer.num_directions)
    return jnp.stack([mean, mean])


def scaled_norms(norms: Array, num_samples: int, scalings: tuple[float, float]) -> Array:
    """Mean diagonals of the Gram matrices, shape (2,), over N and the scalings of both factors."""
    overs = jnp.asarray([num_samples * scaling for scaling in scalings], norms.dtype)
    return norms / overs


def _invert_rows(rows: Array, rho: Array | float, shifted: bool) -> Entry:
    """(r^T r + rho)^{-1} = outside - r^T core r for rows r (R, P); the pseudo-inverse at 0."""
    gram = inverse_psd(add_diagonal(symmetric_product(rows), rho), shifted=shifted)
    if not shifted:
        return {"rows": rows, "core": -gram @ gram, "outside": jnp.zeros((), rows.dtype)}
    return {"rows": rows, "core": gram / rho, "outside": jnp.asarray(1 / rho, rows.dtype)}


def _last(factors: tuple[Entry, ...]) -> int:
    """The place of the last affine layer."""
    return max((i for i, a in enumerate(factors) if "units" in a), default=len(factors) - 1)


def _inputs(entry: Entry) -> Array:
    """A of every group, or its rows, from statistics."""
    return next(entry[name] for name in ("inputs", "shared", "rows") if name in entry)


def _mean_diagonal(factors: Array) -> Array:
    """Of all groups together."""
    return jnp.einsum("gkk->", factors) / float(factors.shape[0] * factors.shape[1])


def num_positions(layer: AffineSignals, sharing: Sharing) -> int:
    """How many rows of A a sample has in each group: T for "expand" of shared weights, else 1."""
    if isinstance(layer, SharedSignals) and sharing == "expand":
        return layer.num_positions
    return 1


def factor_means(layer: AffineSignals, sharing: Sharing) -> tuple[Array, Array]:
    """A = sum a^T a / (N T) and B = sum D^T D / N for each group; means over samples."""
    left, right = factor_rows(layer, sharing)
    n = layer.num_samples
    over = float(n * num_positions(layer, sharing))
    return _products(left) / over, _products(right) / float(n)


def _products(rows: Array) -> Array:
    return jnp.stack([symmetric_product(group.T) for group in rows])


def inverse_groups(factors: Array, rho: Array | float, *, shifted: bool) -> Array:
    """(A + rho)^{-1} for each of g groups, shape (g, K, K); the pseudo-inverse at the number 0."""

    def group(factor: Array) -> Array:
        return inverse_psd(add_diagonal(factor, rho), shifted=shifted)

    return over_groups(group, factors)


def kronecker_words(layer: LayerSignals, sharing: Sharing) -> str:
    """What becomes of the Fisher block of a layer, in words."""
    if isinstance(layer, ExplicitSignals):
        return "exact block a unit"
    return f"Kronecker, {sharing}" if isinstance(layer, SharedSignals) else "Kronecker"
