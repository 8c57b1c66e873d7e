"""Kronecker-factored Fisher (K-FAC)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.linalg import has_full_rank
from natgrad_flax.operators.base import Blocks, Space, check_space, in_parameters
from natgrad_flax.operators.kronecker import AffineSignals, Dampings, Kronecker
from natgrad_flax.operators.units import UnitBlocks
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.signals import DenseSignals, Signals
from natgrad_flax.structures.base import (
    Geometry,
    IsotropyWarning,
    coefficient_by_columns,
    dense_layer,
    has_shared_layers,
)
from natgrad_flax.structures.kronecker_average import (
    KroneckerAverage,
    block_norms,
    num_positions,
    scaled_norms,
)


@dataclass(frozen=True)
class KFAC(KroneckerAverage):
    """Blocks (B* + rho I) (x) (A* + rho I), A* = a^T a / N, B* = D^T D / N (Eq. 20).

    Taken literally, Eq. 20 gives the isotropy constant alpha = N (L - 1) + 1, because B* of the
    last layer is 1 and not 1/N. Eq. 21 and alpha = N L need B* / N there. With fewer inputs than
    samples layer 1 is isotropic only after a Forster transform, with N replaced by the input
    dimension. Each factor is inverted in the smaller of sample and parameter space.

    Weights that T positions share have the factors of "expand", A* = sum a^T a / (N T) and
    B* = sum D^T D / N over samples and positions (Grosse & Martens 2016), or of "reduce", with the
    mean of the inputs and the sum of the derivatives over the positions of a sample (Eschenhagen et
    al. 2023). Groups of units have factors of their own. Parameters without such factors (scale and
    bias of normalisations, parameters without a formula) keep their exact Fisher block a unit.

    Args:
      last_layer: "scaled" (B* / N in the last layer: Eq. 21) or "literal" (Eq. 20).
      split: "plain" adds rho to both factors (Eq. 20); "pi" adds pi sqrt(rho) to A* and
        sqrt(rho) / pi to B*, with pi^2 the ratio of their mean diagonals (Martens & Grosse 2015).
      first_layer: "scaled" multiplies the update of a first layer with fan-in below N by
        N / fan-in, so that alpha = N L holds after a Forster transform; or "literal".
      space: "sample", "parameter" or "auto", for both factors.
      sharing: "expand" or "reduce", for weights that several positions share.
    """

    last_layer: Literal["scaled", "literal"] = "scaled"
    split: Literal["plain", "pi"] = "plain"
    first_layer: Literal["literal", "scaled"] = "literal"
    space: Space = "auto"
    sharing: Sharing = "expand"
    infinite_width = "all"
    damping_margin = 100.0  # it stands in both factors

    def __post_init__(self) -> None:
        check_space(self.space)
        for field, allowed in (
            ("last_layer", ("scaled", "literal")),
            ("split", ("plain", "pi")),
            ("first_layer", ("literal", "scaled")),
            ("sharing", ("expand", "reduce")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")

    def _scalings(
        self, index: int, last: int, fan_in: int, shared: bool, num_samples: int
    ) -> tuple[float, float]:
        """By how much the divisors of A* and B* are larger than those of the means."""
        dense_first = index == 0 and fan_in < num_samples and not shared
        scaled = dense_first and self.first_layer == "scaled"
        return (
            num_samples / fan_in if scaled else 1.0,
            float(num_samples) if index == last and self.last_layer == "scaled" else 1.0,
        )

    def divisors(self, signals: Signals, index: int) -> tuple[float, float]:
        """What the sums of products of rows are divided by: A* = a^T a / d_A, B* = D^T D / d_B.

        Args:
          signals: of the batch.
          index: of an affine layer.
        """
        n, layer = signals.num_samples, signals.layers[index]
        assert isinstance(layer, (DenseSignals, SharedSignals))
        shared = isinstance(layer, SharedSignals)
        by_a, by_b = self._scalings(index, _last(signals), layer.fan_in, shared, n)
        return n * num_positions(layer, self.sharing) * by_a, n * by_b

    def operator(self, signals: Signals) -> Blocks:
        """(B* + rho_B) (x) (A* + rho_A) of affine layers, the blocks of the units of others."""
        return Blocks(
            tuple(
                UnitBlocks(layer, self.space)
                if isinstance(layer, ExplicitSignals)
                else self._kronecker(signals, index)
                for index, layer in enumerate(signals.layers)
            )
        )

    def _kronecker(self, signals: Signals, index: int) -> Kronecker:
        layer = signals.layers[index]
        assert isinstance(layer, (DenseSignals, SharedSignals))
        divisors = self.divisors(signals, index)
        split = partial(self.dampings, layer, divisors)
        return Kronecker.of(layer, self.sharing, divisors, self.space, split)

    def dampings(
        self,
        layer: AffineSignals,
        overs: tuple[float, float],
        damping: Array | float,
    ) -> Dampings:
        """What is added to A* and to B*.

        Args:
          layer: signals of the layer.
          overs: the divisors.
          damping: one number, split as ``split`` says, or the pair itself, shape (2,).
        """
        sum_a, sum_b = self._row_norms(layer)
        groups = layer.num_groups if isinstance(layer, SharedSignals) else 1
        mean_a = sum_a / float(overs[0] * layer.fan_in * groups)
        mean_b = sum_b / float(overs[1] * layer.num_units)
        return self._split(damping, mean_a, mean_b)

    def _split(self, damping: Array | float, mean_a: Array, mean_b: Array) -> Dampings:
        """As ``dampings``, from the mean diagonals of both factors."""
        if jnp.ndim(damping) == 1:
            pair = jnp.asarray(damping)
            return pair[0], pair[1]
        if self.split == "plain" or is_zero(damping):
            return damping, damping
        usable = (mean_a > 0) & (mean_b > 0)
        pi = jnp.where(usable, jnp.sqrt(mean_a / jnp.where(usable, mean_b, 1)), 1)
        root = jnp.sqrt(jnp.asarray(damping, mean_a.dtype))
        return pi * root, root / pi

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_l (B(x',x) B^{-1}) . (A(x',x) A^{-1}), times N (Karakida & Osawa 2020, Eq. 21)."""
        if has_shared_layers(train):
            return coefficient_by_columns(self, test, train, damping)
        total = jnp.zeros((), train.outputs.dtype)
        rhos = per_layer(damping, len(train.layers))
        for index, (there, rho) in enumerate(zip(map(dense_layer, test.layers), rhos, strict=True)):
            total = total + self._kronecker(train, index).cross(there, rho) / train.num_samples
        return total

    def undamped_diagonal(self, train: Signals) -> Array | None:
        """N a hidden layer; leverages of samples in the first, of outputs in the last.

        None where the inputs of another layer lack rank N, or derivatives rank N S.
        """
        if has_shared_layers(train):
            return None
        layers = list(map(dense_layer, train.layers))
        grams = [*(a.input_gram() for a in layers[1:]), *(a.derivative_gram() for a in layers[:-1])]
        if not all(has_full_rank(gram) for gram in grams):
            return None
        total = jnp.zeros(train.size, train.outputs.dtype)
        for index, layer in enumerate(layers):
            block = self._kronecker(train, index)
            inputs = jnp.full(layer.num_samples, block.left.divisor, total.dtype)
            units = jnp.full(train.size, block.right.divisor, total.dtype)
            if index == 0:
                inputs = jnp.diagonal(block.left.cross(block.left.rows, 0.0))
            if index == len(train.layers) - 1:
                units = jnp.diagonal(block.right.cross(block.right.rows, 0.0))
            total = total + units * jnp.repeat(inputs, layer.num_seeds) / train.num_samples
        return total

    def gram_size(self, signals: Signals) -> int:
        """The larger of the two factors, each on the side that ``space`` chooses."""
        sides = []
        for layer in signals.layers:
            pairs = [(layer.num_samples, layer.fan_in), (signals.size, layer.num_units)]
            if isinstance(layer, SharedSignals):
                positions = layer.num_positions if self.sharing == "expand" else 1
                pairs = [(positions * samples, params) for samples, params in pairs]
            elif isinstance(layer, ExplicitSignals):
                pairs = [(signals.size, layer.fan_in)]
            for samples, params in pairs:
                sides.append(params if in_parameters(self.space, samples, params) else samples)
        return max(sides)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonals of the Gram matrices of A* and of B*, over their divisors, (L, 2)."""
        scales, n = [], signals.num_samples
        for index, layer in enumerate(signals.layers):
            if isinstance(layer, ExplicitSignals):
                scales.append(block_norms(layer) / n)
                continue
            assert isinstance(layer, (DenseSignals, SharedSignals))
            shared = isinstance(layer, SharedSignals)
            scalings = self._scalings(index, _last(signals), layer.fan_in, shared, n)
            scales.append(scaled_norms(self._gram_means(layer), n, scalings))
        return jnp.stack(scales)

    def alpha(self, geometry: Geometry) -> float:
        """N L with both scalings, N (L - 1) + 1 literally; layer 1 counts its fan-in where below N.

        The value for a first layer with fan-in below N holds after a Forster transform, and an
        ``IsotropyWarning`` says so.
        """
        n, fan_in = geometry.num_samples, geometry.layers[0][0]
        counts = [float(n)] * geometry.depth
        if fan_in < n:
            warnings.warn(
                f"KFAC: layer 1 has {fan_in} inputs for {n} samples; it is isotropic, and this "
                "alpha right, only after a Forster transform of the inputs "
                "(natgrad_datasets.forster_transform)",
                IsotropyWarning,
                stacklevel=3,
            )
            if self.first_layer == "literal":
                counts[0] = fan_in
        if self.last_layer == "literal":
            counts[-1] = counts[-1] / n
        return float(sum(counts))

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """Inputs of every layer but the first at least N; hidden units at least N C."""
        n, outputs = geometry.num_samples, geometry.num_samples * geometry.num_outputs
        failures = []
        for index, (fan_in, units) in enumerate(geometry.layers):
            if index > 0 and fan_in < n:
                failures.append(f"layer {index + 1} has {fan_in} inputs for {n} samples")
            if index < geometry.depth - 1 and units < outputs:
                failures.append(f"layer {index + 1} has {units} units for N C = {outputs} outputs")
        return failures


def _last(signals: Signals) -> int:
    """The place of the last affine layer; parameters without a formula stand behind it."""
    affine = [i for i, a in enumerate(signals.layers) if not isinstance(a, ExplicitSignals)]
    return affine[-1] if affine else len(signals.layers) - 1
