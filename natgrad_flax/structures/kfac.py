"""Kronecker-factored Fisher (K-FAC)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import as_pair, by_traces, is_zero
from natgrad_flax.linalg.dense import has_full_rank
from natgrad_flax.operators.base import Space, check_space
from natgrad_flax.operators.kronecker import AffineSignals, Dampings, Kronecker, affine
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals, Sharing
from natgrad_flax.structures.base import (
    IsotropyWarning,
    dense_layer,
    has_shared_layers,
)
from natgrad_flax.structures.factor_entries import num_positions
from natgrad_flax.structures.geometry import Geometry, NeededRank, SharedGeometry
from natgrad_flax.structures.kronecker_average import (
    KroneckerAverage,
    Scalings,
    Size,
    factor_sides,
    kronecker_entries,
    kronecker_words,
    no_shared_limit,
    scaled_norms,
)
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class KFAC(KroneckerAverage):
    """One Kronecker product a layer, (B* + rho I) (x) (A* + rho I) (Martens & Grosse 2015).

    A* = a^T a / N is the second moment of the inputs of a layer, B* = D^T D / N that of the
    derivatives of its units (Karakida & Osawa 2020, Eq. 20).

    Taken literally, Eq. 20 gives the isotropy constant alpha = N (L - 1) + 1, because B* of the
    last layer is 1 and not 1/N. Eq. 21 and alpha = N L need B* / N there. With fewer inputs than
    samples layer 1 is isotropic only after a Forster transform, with N replaced by the input
    dimension. Each factor is inverted in the smaller of sample and parameter space.

    Weights that T positions share have the factors of "expand", A* = sum a^T a / (N T) and
    B* = sum D^T D / N over samples and positions (Grosse & Martens 2016), or of "reduce", with the
    mean of the inputs and the sum of the derivatives over the positions of a sample (Eschenhagen et
    al. 2023). Weights of samples and positions weigh the rows of both factors (``weigh_rows``).
    Weights that are also used transposed (tied embeddings) have one pair for both uses, which is
    balanced between them (``TiedSignals``); of a table that is read out A* is a diagonal.
    Groups of units have factors of their own. Parameters without such factors (scale and
    bias of normalisations, parameters without a formula) keep their exact Fisher block a unit.

    Args:
      last_layer: "scaled" (B* / N in the last layer: Eq. 21) or "literal" (Eq. 20). N does not
        count samples of weight 0.
      split: "plain" adds rho to both factors (Eq. 20); "pi" adds pi sqrt(rho) to A* and
        sqrt(rho) / pi to B*, with pi^2 the ratio of their mean diagonals (Martens & Grosse 2015).
      first_layer: "scaled" multiplies the update of a first layer with fan-in below N by
        N / fan-in, so that alpha = N L holds after a Forster transform; or "literal".
      space: "sample", "parameter" or "auto", for both factors.
      sharing: "expand" or "reduce", for weights that several positions share.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, structure=ng.KFAC(), **options)
      >>> ng.optimal_learning_rate(ng.KFAC(), model, 4)  # 1 / (N L)
      0.125
    """

    last_layer: Literal["scaled", "literal"] = "scaled"
    split: Literal["plain", "pi"] = "plain"
    first_layer: Literal["literal", "scaled"] = "literal"
    space: Space = "auto"
    sharing: Sharing = "expand"
    style = styled("K-FAC", "#CC79A7", "v", command="kfac", short="K-FAC")
    optimal_rate = "1/(N L)"
    infinite_width = "all"
    stacking = "inner"
    shared_weights = "rows"
    limit_kernels = ("inputs", "derivatives")
    coefficient_arrays = (0.0, 8.0)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank]:
        """N T_l of the inputs, and N C T_l of the derivatives of all layers but the last.

        Fully connected, the inputs of layer 1 may have equal leverages instead, as a Forster
        transform makes them (Section 4.2). Parameters without inputs and units are left out.
        """
        shared = isinstance(geometry, SharedGeometry)
        if shared and self.sharing == "reduce":
            return []
        n, c = geometry.num_samples, geometry.num_outputs
        needs = []
        for index, ((fan_in, units), count) in enumerate(
            zip(geometry.layers, geometry.positions, strict=True)
        ):
            if count is None:
                continue
            first = index == 0 and not shared
            needs.append(
                NeededRank(index, "equal leverages" if first else "inputs", n * count, fan_in)
            )
            if index < geometry.depth - 1:
                needs.append(NeededRank(index, "derivatives", n * c * count, units))
        return needs

    def outside_theory(self, geometry: Geometry) -> list[str]:
        """Means over positions, and parameters without inputs and units."""
        if self.sharing == "reduce" and isinstance(geometry, SharedGeometry):
            return [
                'KFAC(sharing="reduce") takes means over positions, which span no Jacobian of them'
            ]
        return [
            f"{geometry.where(index)} has no inputs and units"
            for index, count in enumerate(geometry.positions)
            if count is None
        ]

    def shared_alpha(self, geometry: SharedGeometry) -> float:
        """N sum_l T_l^2, with 1 in place of N for a literal last layer."""
        positions = geometry.positions
        if None in positions or positions[-1] != 1:
            raise ValueError(
                "alpha of KFAC is known for layers with inputs and units, the last of one position"
            )
        if self.sharing == "reduce":
            raise ValueError(
                'alpha of KFAC(sharing="reduce") is known without shared weights only: the means '
                "over positions do not span the Jacobians"
            )
        n = geometry.num_samples
        hidden = sum(n * count**2 for count in positions[:-1] if count is not None)
        return float(hidden + (n if self.last_layer == "scaled" else 1))

    def no_limit(self, shared: bool) -> str:
        """Factors of infinite size have no trace, and kernels of layers do not hold positions."""
        if self.split == "pi":
            return (
                'KFAC(split="pi") compares traces of factors of infinite size; use split="plain", '
                'or kernels="empirical"'
            )
        return no_shared_limit("KFAC") if shared else ""

    def after_forster(self) -> KFAC:
        """The first layer is isotropic then, with alpha = N L."""
        return replace(self, first_layer="scaled")

    @property
    def inner(self) -> KFAC:
        """See ``Structure.inner``."""
        return replace(self, last_layer="literal", first_layer="literal")

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

    def _scalings(self, sizes: list[Size], num_samples: int | Array) -> Scalings:
        """See ``KroneckerAverage``; parameters without a formula stand behind all affine layers."""
        n = num_samples if isinstance(num_samples, Array) else float(num_samples)
        scalings: Scalings = [(1.0, 1.0)] * len(sizes)
        places = [index for index, size in enumerate(sizes) if size is not None]
        if places and self.last_layer == "scaled":
            scalings[places[-1]] = (1.0, n)
        if sizes[0] is not None and self.first_layer == "scaled":
            fan_in, shared = sizes[0]
            if not shared:
                larger = jnp.maximum(n, fan_in) if isinstance(n, Array) else max(n, fan_in)
                scalings[0] = (larger / fan_in, scalings[0][1])
        return scalings

    def _scalings_on(self, signals: Signals) -> Scalings:
        sizes: list[Size] = [
            None
            if isinstance(layer, ExplicitSignals)
            else (layer.fan_in, isinstance(layer, SharedSignals))
            for layer in signals.layers
        ]
        return self._scalings(sizes, signals.num_counted)

    def _kronecker(self, signals: Signals, index: int) -> Kronecker:
        """(B* + rho_B) (x) (A* + rho_A); see ``FactorAverage``."""
        n, layer = signals.num_samples, affine(signals.layers[index])
        by_a, by_b = self._scalings_on(signals)[index]
        divisors = n * num_positions(layer, self.sharing) * by_a, n * by_b
        split = partial(self._dampings, layer, divisors)
        return Kronecker.of(layer, self.sharing, divisors, self.space, split)

    def _dampings(
        self,
        layer: AffineSignals,
        overs: tuple[float | Array, float | Array],
        damping: Array | float,
    ) -> Dampings:
        """What is added to A* = a^T a / overs[0] and to B* = D^T D / overs[1]."""
        sum_a, sum_b = self._row_norms(layer)
        groups = layer.num_groups if isinstance(layer, SharedSignals) else 1
        # floats: products of sizes outgrow the integers of XLA
        mean_a = sum_a / (overs[0] * float(layer.fan_in * groups))
        mean_b = sum_b / (overs[1] * float(layer.num_units))
        return self._split(damping, mean_a, mean_b)

    def _split(self, damping: Array | float, mean_a: Array, mean_b: Array) -> Dampings:
        """See ``KroneckerAverage``; a damping of shape (2,) is the pair itself."""
        if self.split == "plain" or is_zero(damping) or jnp.ndim(damping) == 1:
            return as_pair(damping)
        return by_traces(damping, mean_a, mean_b)

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
            total = total + units * jnp.repeat(inputs, layer.num_directions) / train.num_samples
        return total

    def gram_size(self, signals: Signals) -> int:
        """The larger of the two factors, each on the side that ``space`` chooses."""
        return max(max(factor_sides(layer, self.sharing, self.space)) for layer in signals.layers)

    def system_arrays(self, signals: Signals) -> float:
        """Both factors of the layers at work, their inverses and what is between."""
        return 8.0

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonals of the Gram matrices of A* and of B*, over their divisors, (L, 2)."""
        norms = [self._gram_means(layer) for layer in signals.layers]
        return scaled_norms(norms, self._scalings_on(signals), signals.num_counted)

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
        return kronecker_entries(geometry)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return kronecker_words(layer, self.sharing)
