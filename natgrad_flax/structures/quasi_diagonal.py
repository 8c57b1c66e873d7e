"""Quasi-diagonal Fisher of Ollivier."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import RelativeDamping, per_layer
from natgrad_flax.linalg.dense import eigvalsh, rank_cutoff, reciprocal
from natgrad_flax.operators.base import Blocks, OfLayer
from natgrad_flax.operators.entries import Entries, divide
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, ravel
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.signals.shared import SharedSignals
from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.base import (
    Geometry,
    dense_layer,
    has_shared_layers,
)
from natgrad_flax.structures.diagonal import (
    Diagonal,
    layer_diagonal,
    mean_squares,
    no_alpha,
    sum_over_units,
)
from natgrad_flax.structures.exact import mean_diagonal
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class QuasiDiagonal(AveragedStructure):
    """For each unit the bias row and the diagonal of its Fisher block (Ollivier 2015).

    With M the unit's block of F + rho I, index 0 its bias and j its weights, the metric is
    M_0 M_0^T / M_00 + diag(0, M_jj - M_0j^2 / M_00). It keeps M_00, M_0j and M_jj, and amounts to a
    diagonal metric for inputs centred with weights D^2. Layers without a bias fall back to the
    diagonal. Not isotropic (Karakida & Osawa 2020, Fig. 3).

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), bias_variance=0.1, rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(
      ...     model, x, y, structure=ng.QuasiDiagonal(), **options
      ... )
      >>> {name: array.shape for name, array in step["layers"][0].items()}
      {'bias': (8,), 'kernel': (4, 8)}
    """

    style = styled("Quasi-diagonal", "#8C6D1F", "p", short="quasi-diag")
    stacking = "all"
    default_damping = RelativeDamping(1e-3)  # as for ``Diagonal``
    without_biases = "diagonal"
    cheap_inverse = True
    damping_margin = 1.0  # no system is solved

    def operator(self, signals: Signals) -> Blocks:
        """The metric of every layer, the diagonal where it has no bias."""
        pairs = zip(signals.layers, self.latest(signals), strict=True)
        return Blocks(
            tuple(
                BiasAndDiagonal(layer, found) if "mixed" in found else Entries(layer, found)
                for layer, found in pairs
            )
        )

    def statistics(self, signals: Signals) -> tuple[LayerUpdate, ...]:
        """The diagonal of F, and with a bias its products with the weights, "mixed" (K, M)."""
        return tuple(map(_layer_statistics, signals.layers))

    def latest(self, signals: Signals) -> tuple[LayerUpdate, ...]:
        """As ``statistics`` of centred inputs, with their "centre" over that of the bias."""
        found = []
        for layer in signals.layers:
            near, centre = _centred(layer)
            entry = _layer_statistics(near)
            found.append(entry if centre is None else {**entry, "centre": centre})
        return tuple(found)

    def moments(self, signals: Signals) -> Moments:
        """Of one batch, and so of centred inputs."""
        return Moments(self.latest(signals))

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[LayerUpdate, ...]:
        """M_00, the ratios M_0j / M_00, and what is left of M_jj; without a bias M_jj."""
        factors = moments.factors
        return tuple(
            _damped_entries(entry, rho, num_samples)
            for entry, rho in zip(factors, per_layer(damping, len(factors)), strict=True)
        )

    def apply(
        self, inverse: tuple[LayerUpdate, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """The metric solved unit by unit: weights first, then what they leave of the bias."""
        return tuple(
            _solve_units(entries, g, centred=False)
            for entries, g in zip(inverse, gradient, strict=True)
        )

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """As for the diagonal with inputs a_j - (M_0j / M_00) a_0, plus the bias direction."""
        if has_shared_layers(train):
            return super().coefficient(test, train, damping)
        total = jnp.zeros((), train.outputs.dtype)
        for test_layer, train_layer, rho in zip(
            map(dense_layer, test.layers),
            map(dense_layer, train.layers),
            per_layer(damping, len(train.layers)),
            strict=True,
        ):
            scale, alone = train_layer.bias_scale, dataclasses.replace(train, layers=(train_layer,))
            if scale is None:
                left = dataclasses.replace(test, layers=(test_layer,))
                total = total + Diagonal().coefficient(left, alone, rho)
                continue
            (entries,) = self.invert(self.moments(alone), rho, train_layer.num_samples)
            rows = (
                entries["ratio"].T,
                reciprocal(entries["kernel"]).T,
                reciprocal(entries["bias"]),
            )

            def kernel(
                row: tuple[Array, ...],
                left: Array = test_layer.inputs,
                right: Array = train_layer.inputs,
                scale: float = scale,
            ) -> Array:
                ratio, weight, bias = row
                centred = (left - scale * ratio) * weight
                return centred @ (right - scale * ratio).T + scale**2 * bias

            total = (
                total + sum_over_units(test_layer, train_layer, rows, kernel) / train.num_samples
            )
        return total

    def gram_size(self, signals: Signals) -> int:
        """0: it is inverted in 2 x 2 systems, one an entry."""
        return 0

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """Mean of the diagonal of F, one value a layer."""
        return Diagonal().scale_of(Moments(tuple(map(_uncentred, moments.factors))), num_samples)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean of the diagonal of F, one value a layer, without the diagonal."""
        return mean_diagonal(signals)

    def alpha(self, geometry: Geometry) -> float:
        """Raises ValueError: not isotropic."""
        raise ValueError(no_alpha(self.name))

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those of the inverse of G, which itself is filled in unit by unit.

        Raises:
          ValueError: a single layer, whose sizes do not show whether it has a bias.
        """
        if geometry.depth == 1:
            raise ValueError(
                "the sizes of a single layer do not show whether it has a bias, on which the cost "
                "of QuasiDiagonal depends; take a network with a hidden layer"
            )
        params = sum(geometry.params)
        layers = zip(geometry.layers, geometry.biases, strict=True)
        mixed = sum((fan_in - 1) * units for (fan_in, units), bias in layers if bias)
        return params + 2 * mixed, params + mixed

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        row = "" if layer.bias_scale is None else " and row of the bias, a unit"
        return f"diagonal{row}"


@dataclass(frozen=True)
class BiasAndDiagonal(OfLayer):
    """M_0 M_0^T / M_00 + diag(0, M_jj - M_0j^2 / M_00) of every unit of a layer with a bias.

    A damping is added to M.

    Attributes:
      layer: the signals.
      moments: M_00, M_0j and M_jj as ``QuasiDiagonal.latest`` returns them.
    """

    layer: LayerSignals
    moments: LayerUpdate

    def damped(self, damping: Array | float) -> LayerUpdate:
        """What solves the metric."""
        return _damped_entries(self.moments, damping, self.layer.num_samples)

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``; of a residual with the gradient of centred inputs."""
        entries = self.damped(damping)
        centred = isinstance(gradient, Residual)
        layer = _centred(self.layer)[0] if centred else self.layer
        (g,) = gradient.vector((layer,))
        return (_solve_units(entries, g, centred=centred),)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        entries, (u,) = self.damped(0.0), vector
        shared = entries["bias"] * (jnp.sum(entries["ratio"] * u["kernel"], axis=0) + u["bias"])
        kernel = entries["ratio"] * shared + entries["kernel"] * u["kernel"]
        return ({"kernel": kernel, "bias": shared},)

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""
        entries = self.damped(0.0)
        kernel = entries["bias"] * entries["ratio"] ** 2 + entries["kernel"]
        return ({"kernel": kernel, "bias": entries["bias"]},)

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        return jnp.sum(ravel(self.diagonal()))

    def eigenvalues(self) -> Array:
        """Of all units, one after the other."""
        return self._eigenvalues(0.0)

    def _eigenvalues(self, damping: Array | float) -> Array:
        return jax.lax.map(eigvalsh, jnp.moveaxis(self._units(damping), 2, 0)).reshape(-1)

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """See ``Operator.extremes``."""
        values = self._eigenvalues(damping)
        return jnp.min(values), jnp.max(values)

    def logdet(self, damping: Array | float) -> Array:
        """Of every unit M_00 and what is left of M_jj: the determinant of the metric."""
        entries = self.damped(damping)
        return jnp.sum(jnp.log(entries["bias"])) + jnp.sum(jnp.log(entries["kernel"]))

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.sample``."""
        entries, keys = self.damped(damping), jax.random.split(key)
        corner, kernel = entries["bias"], entries["kernel"]
        shared = jnp.sqrt(corner) * jax.random.normal(keys[0], corner.shape, corner.dtype)
        apart = jnp.sqrt(kernel) * jax.random.normal(keys[1], kernel.shape, kernel.dtype)
        return ({"kernel": entries["ratio"] * shared + apart, "bias": shared},)

    def _units(self, damping: Array | float) -> Array:
        """The metric of every unit, shape (fan_in, fan_in, M)."""
        entries, layer = self.damped(damping), self.layer
        row = jnp.concatenate([entries["ratio"], jnp.ones((1, layer.num_units))])
        unit = jnp.einsum("ji,ki,i->jki", row, row, entries["bias"])
        rest = jnp.concatenate([entries["kernel"], jnp.zeros((1, layer.num_units))])
        return unit + jnp.einsum("jk,ji->jki", jnp.eye(layer.fan_in), rest)

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """See ``Operator.to_dense``."""
        unit = self._units(damping)
        eye = jnp.eye(self.layer.num_units, dtype=unit.dtype)
        block = jnp.einsum("jki,im->jikm", unit, eye)
        return block.reshape(self.layer.num_params, self.layer.num_params)


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


def _centred(layer: LayerSignals) -> tuple[LayerSignals, Array | None]:
    """The layer with inputs a_j - m_j b around their means m_j b, b the scale of the bias, and m.

    That is another basis of the same functions, in which M_jj - M_0j^2 / M_00 is no difference of
    nearly equal numbers. m is (K, M), or (K, 1) where it is the same for all units; None where
    there is no bias to take the mean, or no inputs.
    """
    scale = layer.bias_scale
    if not scale or not isinstance(layer, (DenseSignals, SharedSignals)):
        return layer, None
    if isinstance(layer, DenseSignals):
        mean = jnp.mean(layer.inputs, axis=0)
        return dataclasses.replace(layer, inputs=layer.inputs - mean), mean[:, None] / scale
    mean = jnp.mean(layer.inputs, axis=(0, 1))
    units = layer.num_units // layer.num_groups
    near = dataclasses.replace(layer, inputs=layer.inputs - mean)
    return near, jnp.repeat(mean.T, units, axis=1) / scale


def _uncentred(entry: LayerUpdate) -> LayerUpdate:
    """The diagonal of F itself."""
    if "centre" not in entry:
        return entry
    centre = entry["centre"]
    moved = centre * (2 * entry["mixed"] + centre * entry["bias"])
    return {**entry, "kernel": entry["kernel"] + moved}


def _damped_entries(
    entry: LayerUpdate, rho: Array | float, num_samples: int | Array
) -> LayerUpdate:
    """What solves the metric of one layer.

    Returns:
      M_00 (M,) as "bias", M_0j / M_00 (K, M) as "ratio", also in the basis of the centred inputs
      ("near"), and as "kernel" what M_0j^2 / M_00 leaves of M_jj, a sum of what is not negative:
      (1/N) sum_ns D^2 (a_j - ratio_j b)^2 + rho (1 + ratio_j^2).
    """
    if "bias" not in entry:
        return {"kernel": entry["kernel"] + rho}
    centre = entry.get("centre", 0.0)
    corner = entry["bias"] + rho
    # one quotient a unit: XLA does not repeat divisions, and would keep (K, M) of them instead
    near = (entry["mixed"] - rho * centre) * reciprocal(corner)
    ratio = near + centre
    varied = entry["kernel"]
    spread = varied + near * (near * entry["bias"] - 2 * entry["mixed"])
    # of a weight whose input does not vary rounding is left, which counts as zero: of the inputs
    # themselves, and of the sum
    noise = rank_cutoff(num_samples, varied.dtype)
    spread = jnp.where(spread > noise**2 * _uncentred(entry)["kernel"], spread, 0)
    left = spread + rho * (1 + ratio**2)
    return {
        "kernel": jnp.where(left > noise * varied, left, 0),
        "bias": corner,
        "ratio": ratio,
        "near": near,
    }


def _solve_units(entries: LayerUpdate, gradient: LayerUpdate, *, centred: bool) -> LayerUpdate:
    """The metric of one layer solved, for a gradient of its inputs or of the centred ones."""
    if "bias" not in gradient:
        return {"kernel": divide(gradient["kernel"], entries["kernel"])}
    taken = entries["near" if centred else "ratio"] * gradient["bias"]
    kernel = divide(gradient["kernel"] - taken, entries["kernel"])
    shared = jnp.sum(entries["ratio"] * kernel, axis=0)
    return {"kernel": kernel, "bias": divide(gradient["bias"], entries["bias"]) - shared}
