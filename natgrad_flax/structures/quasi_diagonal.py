"""Quasi-diagonal Fisher of Ollivier."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import per_layer
from natgrad_flax.signals import DenseSignals, LayerUpdate, Residual, Signals
from natgrad_flax.structures.base import Geometry, Structure, gradient
from natgrad_flax.structures.diagonal import (
    Diagonal,
    divide,
    layer_diagonal,
    mean_squares,
    no_alpha,
    sum_over_units,
)


@dataclass(frozen=True)
class QuasiDiagonal(Structure):
    """For each unit the bias row and the diagonal of its Fisher block (Ollivier 2015).

    With M the unit's block of F + rho I, index 0 its bias and j its weights, the metric is
    M_0 M_0^T / M_00 + diag(0, M_jj - M_0j^2 / M_00). It keeps M_00, M_0j and M_jj, and amounts to a
    diagonal metric for inputs centred with weights D^2. Layers without a bias fall back to the
    diagonal. Not isotropic (Karakida & Osawa 2020, Fig. 3).
    """

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``."""
        updates = []
        for layer, slope, rho in zip(
            signals.layers,
            gradient(signals, residual),
            per_layer(damping, len(signals.layers)),
            strict=True,
        ):
            entries = _layer_entries(layer, rho)
            if layer.bias_scale is None:
                updates.append({"kernel": divide(slope["kernel"], entries.weights)})
                continue
            scaled = divide(slope["bias"], entries.bias)
            kernel = divide(slope["kernel"] - scaled * entries.mixed, entries.remainder)
            shared = divide(jnp.sum(entries.mixed * kernel, axis=0), entries.bias)
            updates.append({"kernel": kernel, "bias": scaled - shared})
        return tuple(updates)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """As for the diagonal with inputs a_j - (M_0j / M_00) a_0, plus the bias direction."""
        total = jnp.zeros((), train.outputs.dtype)
        for there, here, rho in zip(
            test.layers, train.layers, per_layer(damping, len(train.layers)), strict=True
        ):
            scale = here.bias_scale
            if scale is None:
                left = Signals((there,), test.outputs)
                right = Signals((here,), train.outputs)
                total = total + Diagonal().coefficient(left, right, rho)
                continue
            entries = _layer_entries(here, rho)
            inverse = divide(jnp.ones_like(entries.remainder), entries.remainder)
            bias = divide(jnp.ones_like(entries.bias), entries.bias)
            rows = ((entries.mixed * bias).T, inverse.T, bias)

            def kernel(
                row: tuple[Array, ...],
                left: Array = there.inputs,
                right: Array = here.inputs,
                scale: float = scale,
            ) -> Array:
                ratio, weight, bias = row
                centred = (left - scale * ratio) * weight
                return centred @ (right - scale * ratio).T + scale**2 * bias

            total = total + sum_over_units(there, here, rows, kernel) / train.num_samples
        return total

    def to_dense(self, signals: Signals, damping: Array | float = 0.0) -> Array:
        """The metric of every unit, in the order of ``Signals.to_dense``."""
        blocks = []
        for layer, rho in zip(signals.layers, per_layer(damping, len(signals.layers)), strict=True):
            entries = _layer_entries(layer, rho)
            if layer.bias_scale is None:
                blocks.append(jnp.diag(entries.weights.reshape(-1)))
                continue
            ratio = divide(entries.mixed, jnp.broadcast_to(entries.bias, entries.mixed.shape))
            row = jnp.concatenate([ratio, jnp.ones((1, layer.num_units))])
            unit = jnp.einsum("ji,ki,i->jki", row, row, entries.bias)
            rest = jnp.concatenate([entries.remainder, jnp.zeros((1, layer.num_units))])
            unit = unit + jnp.einsum("jk,ji->jki", jnp.eye(layer.fan_in), rest)
            eye = jnp.eye(layer.num_units, dtype=unit.dtype)
            block = jnp.einsum("jki,im->jikm", unit, eye)
            blocks.append(block.reshape(layer.num_params, layer.num_params))
        return jax.scipy.linalg.block_diag(*blocks)

    def gram_size(self, signals: Signals) -> int:
        """0: it is inverted in 2 x 2 systems, one an entry."""
        return 0

    def damping_scale(self, signals: Signals) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        return Diagonal().damping_scale(signals)

    def alpha(self, geometry: Geometry) -> float:
        """Raises ValueError: not isotropic."""
        raise ValueError(no_alpha(self.name))

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """None: nothing is assumed."""
        return []


@dataclass(frozen=True)
class _Entries:
    """M_jj (K, M); with a bias M_00 (M,), M_0j and M_jj - M_0j^2 / M_00 (K, M)."""

    weights: Array
    bias: Array
    mixed: Array
    remainder: Array


def _layer_entries(layer: DenseSignals, rho: Array | float) -> _Entries:
    diagonal = layer_diagonal(layer)
    weights = diagonal["kernel"] + rho
    if layer.bias_scale is None:
        empty = jnp.zeros((0,), weights.dtype)
        return _Entries(weights, empty, empty, empty)
    bias = diagonal["bias"] + rho
    mixed = (layer.bias_scale * layer.inputs).T @ mean_squares(layer)
    inverse = divide(jnp.ones_like(bias), bias)
    remainder = weights - mixed**2 * inverse
    # what is left of a weight whose input does not vary is rounding, and counts as zero
    noise = layer.num_samples * jnp.finfo(weights.dtype).eps
    return _Entries(weights, bias, mixed, jnp.where(remainder > noise * weights, remainder, 0))
