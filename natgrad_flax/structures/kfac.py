"""Kronecker-factored Fisher (K-FAC)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import is_zero, of_block, per_layer
from natgrad_flax.layer_signals import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.linalg import (
    add_diagonal,
    has_full_rank,
    inverse_psd,
    solve_psd,
    symmetric_product,
)
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.signals import DenseSignals, Residual, Signals, expand_samples
from natgrad_flax.structures.base import (
    Geometry,
    IsotropyWarning,
    Space,
    check_space,
    coefficient_by_columns,
    dense_layer,
    has_shared_layers,
    triangle,
)
from natgrad_flax.structures.kronecker import (
    factor_rows,
    grouped,
    in_parameters,
    kronecker_words,
    num_positions,
    solve_kronecker,
    ungrouped,
)
from natgrad_flax.structures.kronecker_average import KroneckerAverage, block_norms, scaled_norms
from natgrad_flax.structures.least_squares import least_squares, normal_solve
from natgrad_flax.structures.units import solve_units


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

    def _in_parameters(self, samples: int, params: int) -> bool:
        return in_parameters(self.space, samples, params)

    def dampings(
        self,
        layer: DenseSignals | SharedSignals,
        damping: Array | float,
        overs: tuple[float, float],
    ) -> tuple[Array | float, Array | float]:
        """What is added to A* and to B*.

        Args:
          layer: signals of the layer.
          damping: one number, split as ``split`` says, or the pair itself, shape (2,).
          overs: the divisors.
        """
        sum_a, sum_b = self._row_norms(layer)
        groups = layer.num_groups if isinstance(layer, SharedSignals) else 1
        mean_a = sum_a / float(overs[0] * layer.fan_in * groups)
        mean_b = sum_b / float(overs[1] * layer.num_units)
        return self._split(damping, mean_a, mean_b)

    def _split(
        self, damping: Array | float, mean_a: Array, mean_b: Array
    ) -> tuple[Array | float, Array | float]:
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

    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.precondition``."""
        rhos = per_layer(damping, len(signals.layers))
        return tuple(
            self._precondition(signals, index, g, rho)
            for index, (g, rho) in enumerate(zip(slope, rhos, strict=True))
        )

    def _precondition(
        self, signals: Signals, index: int, slope: LayerUpdate, rho: Array | float
    ) -> LayerUpdate:
        """G_l^{-1} g of one layer of any kind."""
        layer = signals.layers[index]
        if isinstance(layer, ExplicitSignals):
            solved = solve_units(layer.block, matrix_of(slope), of_block(rho), space=self.space)
            return layer.update(solved)
        assert isinstance(layer, (DenseSignals, SharedSignals))
        overs = self.divisors(signals, index)
        left, right = factor_rows(layer, self.sharing)
        solved = solve_kronecker(
            left,
            right,
            overs,
            self.dampings(layer, rho, overs),
            grouped(matrix_of(slope), len(left)),
            shifted=not is_zero(rho),
            space=self.space,
        )
        return layer.update(ungrouped(solved))

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``."""
        shifted = not is_zero(damping)
        updates = []
        for index, (layer, rho) in enumerate(
            zip(signals.layers, per_layer(damping, len(signals.layers)), strict=True)
        ):
            if not isinstance(layer, DenseSignals):
                slope = layer.pull_back(residual.direction(layer, index) / signals.num_samples)
                updates.append(self._precondition(signals, index, slope, rho))
                continue
            over_a, over_b = self.divisors(signals, index)
            rho_a, rho_b = self.dampings(layer, rho, (over_a, over_b))
            half = self._precondition_units(layer, index, residual, over_b, rho_b, shifted)
            half = half / signals.num_samples
            updates.append(self._precondition_inputs(layer, half, over_a, rho_a, shifted))
        return tuple(updates)

    def _precondition_units(
        self,
        layer: DenseSignals,
        index: int,
        residual: Residual,
        over: float,
        rho: Array | float,
        shifted: bool,
    ) -> Array:
        """r^T D (B* + rho)^{-1} sample by sample, shape (N, M)."""
        flat = layer.flat_derivatives()
        if self._in_parameters(*flat.shape):
            direction = residual.direction(layer, index).T
            if not shifted:
                return normal_solve(flat, over * direction).T
            factor = add_diagonal(symmetric_product(flat.T) / over, rho)
            return solve_psd(factor, direction, shifted=True).T
        # an explicit inverse of the small side leaves one product with the wide one
        inverse = inverse_psd(add_diagonal(layer.derivative_gram(), over * rho), shifted=shifted)
        if residual.coefficients is not None:
            n, s = residual.coefficients.shape
            rows = jnp.einsum("ns,nsm->nm", residual.coefficients, inverse.reshape(n, s, n * s))
            return over * rows @ flat
        direction = residual.direction(layer, index)
        return (direction - ((direction @ flat.T) @ inverse) @ flat) / rho

    def _precondition_inputs(
        self,
        layer: DenseSignals,
        directions: Array,
        over: float,
        rho: Array | float,
        shifted: bool,
    ) -> LayerUpdate:
        """(A* + rho)^{-1} a^T R for R of shape (N, M)."""
        if self._in_parameters(layer.num_samples, layer.fan_in):
            inputs = layer.augmented_inputs()
            if not shifted:
                return layer.unravel((over * least_squares(inputs, directions)).reshape(-1))
            factor = add_diagonal(inputs.T @ inputs / over, rho)
            solved = solve_psd(factor, inputs.T @ directions, shifted=True)
            return layer.unravel(solved.reshape(-1))
        inverse = inverse_psd(add_diagonal(layer.input_gram(), over * rho), shifted=shifted)
        return layer.pull_back(over * inverse @ directions)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_l (B(x',x) B^{-1}) . (A(x',x) A^{-1}), times N (Karakida & Osawa 2020, Eq. 21)."""
        if has_shared_layers(train):
            return coefficient_by_columns(self, test, train, damping)
        shifted = not is_zero(damping)
        total = jnp.zeros((), train.outputs.dtype)
        for index, (there, here, rho) in enumerate(
            zip(
                map(dense_layer, test.layers),
                map(dense_layer, train.layers),
                per_layer(damping, len(train.layers)),
                strict=True,
            )
        ):
            over_a, over_b = self.divisors(train, index)
            rho_a, rho_b = self.dampings(here, rho, (over_a, over_b))
            units = self._unit_coefficient(there, here, over_b, rho_b, shifted)
            inputs = self._input_coefficient(there, here, over_a, rho_a, shifted)
            blown = expand_samples(inputs, there.num_seeds, here.num_seeds)
            total = total + units * blown / train.num_samples
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
            over_a, over_b = self.divisors(train, index)
            inputs = jnp.full(layer.num_samples, over_a, total.dtype)
            units = jnp.full(train.size, over_b, total.dtype)
            if index == 0:
                inputs = jnp.diagonal(self._input_coefficient(layer, layer, over_a, 0.0, False))
            if index == len(train.layers) - 1:
                units = jnp.diagonal(self._unit_coefficient(layer, layer, over_b, 0.0, False))
            total = total + units * jnp.repeat(inputs, layer.num_seeds) / train.num_samples
        return total

    def _unit_coefficient(
        self,
        there: DenseSignals,
        here: DenseSignals,
        over: float,
        rho: Array | float,
        shifted: bool,
    ) -> Array:
        """D' (B* + rho)^{-1} D^T, shape (N' S', N S).

        In sample space by Gram matrices alone: at infinite width there are no rows.
        """
        if self._in_parameters(here.num_samples * here.num_seeds, here.num_units):
            flat = here.flat_derivatives()
            factor = add_diagonal(flat.T @ flat / over, rho)
            return there.flat_derivatives() @ solve_psd(factor, flat.T, shifted=shifted)
        gram = add_diagonal(here.derivative_gram(), over * rho)
        return over * solve_psd(gram, here.derivative_gram(there), shifted=shifted).T

    def _input_coefficient(
        self,
        there: DenseSignals,
        here: DenseSignals,
        over: float,
        rho: Array | float,
        shifted: bool,
    ) -> Array:
        """a' (A* + rho)^{-1} a^T, shape (N', N)."""
        if self._in_parameters(here.num_samples, here.fan_in):
            inputs = here.augmented_inputs()
            factor = add_diagonal(inputs.T @ inputs / over, rho)
            return there.augmented_inputs() @ solve_psd(factor, inputs.T, shifted=shifted)
        gram = add_diagonal(here.input_gram(), over * rho)
        return over * solve_psd(gram, here.input_gram(there), shifted=shifted).T

    def to_dense(self, signals: Signals, damping: Array | float = 0.0) -> Array:
        """Block-diagonal of the Kronecker products."""
        blocks = []
        for index, (layer, rho) in enumerate(
            zip(signals.layers, per_layer(damping, len(signals.layers)), strict=True)
        ):
            if isinstance(layer, ExplicitSignals):
                jacobian = layer.to_dense()
                unit = np.arange(layer.num_params) % layer.num_units
                block = jacobian.T @ jacobian / layer.num_samples
                blocks.append(add_diagonal((unit[:, None] == unit) * block, of_block(rho)))
                continue
            assert isinstance(layer, (DenseSignals, SharedSignals))
            overs = self.divisors(signals, index)
            rho_a, rho_b = self.dampings(layer, rho, overs)
            groups = [
                jnp.einsum(
                    "jk,im->jikm",
                    add_diagonal(a.T @ a / overs[0], rho_a),
                    add_diagonal(b.T @ b / overs[1], rho_b),
                )
                for a, b in zip(*factor_rows(layer, self.sharing), strict=True)
            ]
            # units of group after group within each input
            eye = jnp.eye(len(groups), dtype=groups[0].dtype)
            block = jnp.einsum("gjikm,gh->jgikhm", jnp.stack(groups), eye)
            blocks.append(block.reshape(layer.num_params, layer.num_params))
        return jax.scipy.linalg.block_diag(*blocks)

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
                sides.append(params if self._in_parameters(samples, params) else samples)
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

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those of the layers' blocks, of which the factors are stored."""
        stored = sum(triangle(fan_in) + triangle(units) for fan_in, units in geometry.layers)
        return sum(params**2 for params in geometry.params), stored

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return kronecker_words(layer, self.sharing)


def _last(signals: Signals) -> int:
    """The place of the last affine layer; parameters without a formula stand behind it."""
    affine = [i for i, a in enumerate(signals.layers) if not isinstance(a, ExplicitSignals)]
    return affine[-1] if affine else len(signals.layers) - 1
