"""Quasi-diagonal Fisher of Ollivier."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import per_layer
from natgrad_flax.layer_signals import LayerSignals, LayerUpdate
from natgrad_flax.signals import DenseSignals, Residual, Signals
from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.base import (
    Geometry,
    coefficient_by_columns,
    dense_layer,
    gradient,
    has_shared_layers,
)
from natgrad_flax.structures.diagonal import (
    Diagonal,
    divide,
    layer_diagonal,
    mean_squares,
    no_alpha,
    sum_over_units,
)


@dataclass(frozen=True)
class QuasiDiagonal(AveragedStructure):
    """For each unit the bias row and the diagonal of its Fisher block (Ollivier 2015).

    With M the unit's block of F + rho I, index 0 its bias and j its weights, the metric is
    M_0 M_0^T / M_00 + diag(0, M_jj - M_0j^2 / M_00). It keeps M_00, M_0j and M_jj, and amounts to a
    diagonal metric for inputs centred with weights D^2. Layers without a bias fall back to the
    diagonal. Not isotropic (Karakida & Osawa 2020, Fig. 3).
    """

    cheap_inverse = True

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``."""
        return self.precondition(signals, gradient(signals, residual), damping)

    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.precondition``."""
        moments = self.moments(signals)
        return self.apply(self.invert(moments, damping, signals.num_samples), slope)

    def statistics(self, signals: Signals) -> tuple[LayerUpdate, ...]:
        """The diagonal of F, and with a bias its products with the weights, "mixed" (K, M)."""
        return tuple(map(_layer_statistics, signals.layers))

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int
    ) -> tuple[LayerUpdate, ...]:
        """M_00 + rho, M_0j and what is left of M_jj + rho; without a bias M_jj + rho."""
        factors = moments.factors
        return tuple(
            _damped_entries(entry, rho, num_samples)
            for entry, rho in zip(factors, per_layer(damping, len(factors)), strict=True)
        )

    def apply(
        self, inverse: tuple[LayerUpdate, ...], slope: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """The metric solved unit by unit: weights first, then what they leave of the bias."""
        updates = []
        for entries, g in zip(inverse, slope, strict=True):
            if "bias" not in g:
                updates.append({"kernel": divide(g["kernel"], entries["kernel"])})
                continue
            scaled = divide(g["bias"], entries["bias"])
            kernel = divide(g["kernel"] - scaled * entries["mixed"], entries["kernel"])
            shared = divide(jnp.sum(entries["mixed"] * kernel, axis=0), entries["bias"])
            updates.append({"kernel": kernel, "bias": scaled - shared})
        return tuple(updates)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """As for the diagonal with inputs a_j - (M_0j / M_00) a_0, plus the bias direction."""
        if has_shared_layers(train):
            return coefficient_by_columns(self, test, train, damping)
        total = jnp.zeros((), train.outputs.dtype)
        for there, here, rho in zip(
            map(dense_layer, test.layers),
            map(dense_layer, train.layers),
            per_layer(damping, len(train.layers)),
            strict=True,
        ):
            scale = here.bias_scale
            if scale is None:
                left = Signals((there,), test.outputs)
                right = Signals((here,), train.outputs)
                total = total + Diagonal().coefficient(left, right, rho)
                continue
            entries = _layer_entries(here, rho)
            inverse = divide(jnp.ones_like(entries["kernel"]), entries["kernel"])
            bias = divide(jnp.ones_like(entries["bias"]), entries["bias"])
            rows = ((entries["mixed"] * bias).T, inverse.T, bias)

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
                blocks.append(jnp.diag(entries["kernel"].reshape(-1)))
                continue
            ratio = divide(
                entries["mixed"], jnp.broadcast_to(entries["bias"], entries["mixed"].shape)
            )
            row = jnp.concatenate([ratio, jnp.ones((1, layer.num_units))])
            unit = jnp.einsum("ji,ki,i->jki", row, row, entries["bias"])
            rest = jnp.concatenate([entries["kernel"], jnp.zeros((1, layer.num_units))])
            unit = unit + jnp.einsum("jk,ji->jki", jnp.eye(layer.fan_in), rest)
            eye = jnp.eye(layer.num_units, dtype=unit.dtype)
            block = jnp.einsum("jki,im->jikm", unit, eye)
            blocks.append(block.reshape(layer.num_params, layer.num_params))
        return jax.scipy.linalg.block_diag(*blocks)

    def gram_size(self, signals: Signals) -> int:
        """0: it is inverted in 2 x 2 systems, one an entry."""
        return 0

    def scale_of(self, moments: Moments, num_samples: int) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        return Diagonal().scale_of(moments, num_samples)

    def alpha(self, geometry: Geometry) -> float:
        """Raises ValueError: not isotropic."""
        raise ValueError(no_alpha(self.name))

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """None: nothing is assumed."""
        return []


def _bias_products(layer: LayerSignals) -> Array:
    """M_0j = (1/N) sum_ns J_0 J_j, shape (K, M)."""
    if isinstance(layer, DenseSignals):
        assert layer.bias_scale is not None
        return (layer.bias_scale * layer.inputs).T @ mean_squares(layer)
    jacobian = layer.jacobian()
    products = jnp.einsum("nsm,nskm->km", jacobian[:, :, -1], jacobian[:, :, :-1])
    return products / layer.num_samples


def _layer_statistics(layer: LayerSignals) -> LayerUpdate:
    entries = layer_diagonal(layer)
    return entries if layer.bias_scale is None else {**entries, "mixed": _bias_products(layer)}


def _layer_entries(layer: LayerSignals, rho: Array | float) -> LayerUpdate:
    return _damped_entries(_layer_statistics(layer), rho, layer.num_samples)


def _damped_entries(entry: LayerUpdate, rho: Array | float, num_samples: int) -> LayerUpdate:
    """M_00 (M,) as bias, M_0j as mixed, M_jj - M_0j^2 / M_00 (K, M) as kernel; rho added."""
    weights = entry["kernel"] + rho
    if "bias" not in entry:
        return {"kernel": weights}
    bias, mixed = entry["bias"] + rho, entry["mixed"]
    remainder = weights - mixed**2 * divide(jnp.ones_like(bias), bias)
    # what is left of a weight whose input does not vary is rounding, and counts as zero
    noise = num_samples * jnp.finfo(weights.dtype).eps
    kernel = jnp.where(remainder > noise * weights, remainder, 0)
    return {"kernel": kernel, "bias": bias, "mixed": mixed}
