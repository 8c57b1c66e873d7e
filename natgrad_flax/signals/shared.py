"""Signals of weights that many positions share, and of parameters without a formula.

With T positions (pixels of a convolution, tokens, repeated calls) the Jacobian of an affine layer
is a sum over them, J[(n,s), (k,i)] = sum_t a[n,t,k] D[n,s,t,i]. Its Gram matrix comes either from
these per-sample Jacobians, N S P_l numbers, or from pairs of positions,
K[(n,s), (n',s')] = sum_tt' (a[n,t] . a[n',t']) (D[n,s,t] . D[n',s',t']); whichever is cheaper.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.linalg.dense import symmetric_product
from natgrad_flax.signals.base import (
    AffineLayerSignals,
    LayerSignals,
    LayerUpdate,
    ParameterForm,
    matrix_of,
)
from natgrad_flax.signals.dense import DenseSignals, Signals

Sharing = Literal["expand", "reduce"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["block"],
    meta_fields=["bias_scale", "path", "kernel_form", "bias_form"],
)
@dataclass(frozen=True)
class ExplicitSignals(LayerSignals):
    """The Jacobian block of a layer itself; a cotangent is per-sample parameters (N, fan_in, M).

    Attributes:
      block: J_l, shape (N, S, fan_in, M), the row of the bias last.
      bias_scale: 1 where there is a bias (the block holds its scale), else None.
      path: where the layer stands in the model.
      kernel_form: layout of the kernel.
      bias_form: layout of the bias.
    """

    block: Array
    bias_scale: float | None
    path: tuple[str | int, ...]
    kernel_form: ParameterForm | None = None
    bias_form: ParameterForm | None = None

    @property
    def num_samples(self) -> int:
        """N."""
        return self.block.shape[0]

    @property
    def num_directions(self) -> int:
        """S."""
        return self.block.shape[1]

    @property
    def num_units(self) -> int:
        """M."""
        return self.block.shape[3]

    @property
    def fan_in(self) -> int:
        """Parameters a unit."""
        return self.block.shape[2]

    def take_directions(self, start: int, stop: int) -> ExplicitSignals:
        """The same signals with some of the output directions only."""
        return dataclasses.replace(self, block=self.block[:, start:stop])

    def mix_directions(self, factor: Array) -> ExplicitSignals:
        """The same layer with combinations of its output directions, R of shape (N, S, S')."""
        return dataclasses.replace(self, block=jnp.einsum("nsr,nskm->nrkm", factor, self.block))

    def cotangent(self, index: int) -> Array:
        """J_l of one output direction, shape (N, fan_in, M)."""
        return self.block[:, index]

    def gram(self, other: LayerSignals | None = None) -> Array:
        """J_l J'_l^T, shape (N S, N' S')."""
        flat = self.to_dense()
        return symmetric_product(flat) if other is None else flat @ other.to_dense().T

    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""
        return jnp.sum(self.block**2, axis=(2, 3))

    def combine(self, coefficients: Array) -> Array:
        """sum_s v[n,s] J[n,s], shape (N, fan_in, M)."""
        return jnp.einsum("ns,nskm->nkm", coefficients, self.block)

    def local_vjp(self, cotangents: Array) -> LayerUpdate:
        """The sum over samples."""
        return self.update(jnp.sum(cotangents, axis=0))

    def local_jvp(self, update: LayerUpdate) -> Array:
        """The update, once for every sample."""
        matrix = matrix_of(update)
        return jnp.broadcast_to(matrix, (self.num_samples, *matrix.shape))

    def jvp(self, update: LayerUpdate) -> Array:
        """J_l times the update, shape (N, S)."""
        flat = self.to_dense() @ matrix_of(update).reshape(-1)
        return flat.reshape(self.num_samples, self.num_directions)

    def jacobian(self) -> Array:
        """J_l as (N, S, fan_in, M)."""
        return self.block

    def squares(self) -> LayerUpdate:
        """sum_n sum_s J_l^2, entry by entry."""
        return self.update(jnp.sum(self.block**2, axis=(0, 1)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "derivatives", "row_weights"],
    meta_fields=["bias_scale", "path", "kernel_form", "bias_form"],
)
@dataclass(frozen=True)
class SharedSignals(AffineLayerSignals):
    """Signals of an affine layer whose weights serve T positions; a cotangent is (N, T, G, M/G).

    With G groups the units fall into G sets, each with inputs of its own; unit g M/G + m is the
    m-th of group g.

    Attributes:
      inputs: a, shape (N, T, G, K), times the scale of the weights.
      derivatives: D, shape (N, S, T, G, M/G): derivatives of the S outputs with respect to
        the pre-activations at every position.
      bias_scale: the factor in front of the bias, None where the layer has none.
      path: where the layer stands in the model.
      kernel_form: layout of the kernel.
      bias_form: layout of the bias.
      row_weights: how much the inputs of a position count in a Kronecker factor, (N, T) of mean 1
        over the whole batch; None where all count the same.
    """

    inputs: Array
    derivatives: Array
    bias_scale: float | None
    path: tuple[str | int, ...]
    kernel_form: ParameterForm | None = None
    bias_form: ParameterForm | None = None
    row_weights: Array | None = None

    @property
    def num_positions(self) -> int:
        """T."""
        return self.inputs.shape[1]

    @property
    def num_groups(self) -> int:
        """G."""
        return self.inputs.shape[2]

    @property
    def num_units(self) -> int:
        """M, of all groups."""
        return self.derivatives.shape[3] * self.derivatives.shape[4]

    def mix_directions(self, factor: Array) -> SharedSignals:
        """The same layer with combinations of its output directions, R of shape (N, S, S')."""
        mixed = jnp.einsum("nsr,nstgm->nrtgm", factor, self.derivatives)
        return dataclasses.replace(self, derivatives=mixed)

    def explicit(self) -> ExplicitSignals:
        """The same layer by its per-sample Jacobians, N S P_l numbers."""
        scale = None if self.bias_scale is None else 1.0
        return ExplicitSignals(self.jacobian(), scale, self.path, self.kernel_form, self.bias_form)

    def jacobian(self) -> Array:
        """J_l as (N, S, fan_in, M)."""
        n, s, _, g, m = self.derivatives.shape
        kernel = jnp.einsum("ntgk,nstgm->nskgm", self.inputs, self.derivatives)
        kernel = kernel.reshape(n, s, -1, g * m)
        if self.bias_scale is None:
            return kernel
        bias = self.bias_scale * jnp.sum(self.derivatives, axis=2).reshape(n, s, 1, g * m)
        return jnp.concatenate([kernel, bias], axis=2)

    def pairs_are_cheaper(self, other: SharedSignals | None = None) -> bool:
        """Whether the Gram matrix costs fewer flops by pairs of positions than by Jacobians."""
        second = self if other is None else other
        n, s, t, g, m = self.derivatives.shape
        k, rows, columns = self.fan_in, n * t, second.num_samples * second.num_positions
        pairs = rows * columns * g * (k + s * second.num_directions * m)
        blocks = (rows * s + columns * second.num_directions) * g * k * m
        blocks += n * s * second.num_samples * second.num_directions * self.num_params
        # the pairs are also held at once, so they must not outgrow the Jacobians either
        held = rows * columns * g * (1 + s * second.num_directions)
        return pairs < blocks and held < (n * s + second.num_samples) * self.num_params

    @property
    def gram_by(self) -> str:
        """Pairs of positions, or Jacobians."""
        return "pairs of positions" if self.pairs_are_cheaper() else "Jacobians"

    def gram(self, other: SharedSignals | None = None) -> Array:
        """J_l J'_l^T, shape (N S, N' S')."""
        if not self.pairs_are_cheaper(other):
            return self.explicit().gram(None if other is None else other.explicit())
        second = self if other is None else other
        inputs = jnp.einsum("ntgk,pugk->gntpu", self.inputs, second.inputs)
        if self.bias_scale is not None:
            inputs = inputs + self.bias_scale**2
        units = jnp.einsum("nstgm,prugm->gnstpru", self.derivatives, second.derivatives)
        gram = jnp.einsum("gntpu,gnstpru->nspr", inputs, units)
        return gram.reshape(self.num_samples * self.num_directions, -1)

    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""
        return self.explicit().gram_norms()

    def combine(self, coefficients: Array) -> Array:
        """sum_s v[n,s] D[n,s], shape (N, T, G, M/G)."""
        return jnp.einsum("ns,nstgm->ntgm", coefficients, self.derivatives)

    def local_vjp(self, cotangents: Array) -> LayerUpdate:
        """sum_nt a[n,t] R[n,t]."""
        g, m = cotangents.shape[2:]
        kernel = jnp.einsum("ntgk,ntgm->kgm", self.inputs, cotangents)
        update = {"kernel": kernel.reshape(-1, g * m)}
        if self.bias_scale is not None:
            update["bias"] = self.bias_scale * jnp.sum(cotangents, axis=(0, 1)).reshape(-1)
        return update

    def local_jvp(self, update: LayerUpdate) -> Array:
        """The change of the pre-activations, shape (N, T, G, M/G)."""
        g, m = self.derivatives.shape[3:]
        kernel = update["kernel"].reshape(-1, g, m)
        moved = jnp.einsum("ntgk,kgm->ntgm", self.inputs, kernel)
        if self.bias_scale is None:
            return moved
        return moved + self.bias_scale * update["bias"].reshape(g, m)

    def jvp(self, update: LayerUpdate) -> Array:
        """J_l applied to a step in the parameters, shape (N, S)."""
        return jnp.einsum("nstgm,ntgm->ns", self.derivatives, self.local_jvp(update))

    def squares(self) -> LayerUpdate:
        """sum_n sum_s J_l^2, entry by entry."""
        return self.explicit().squares()

    def row_norms(self, sharing: Sharing) -> tuple[Array, Array]:
        """Sums of the squares of both arrays of ``rows``."""
        left, right = self.rows(sharing)
        return jnp.sum(left**2), jnp.sum(right**2)

    def rows(self, sharing: Sharing) -> tuple[Array, Array]:
        """What K-FAC builds its factors of, for each group: (G, R, fan_in) and (G, R S, M/G).

        "expand" takes every position as a sample of its own, R = N T; "reduce" takes for every
        sample the mean of its inputs and the sum of its derivatives over positions, R = N
        (Eschenhagen et al. 2023). The sum over rows of both, over R and N, gives the factors.
        """
        weights = self.row_weights
        if sharing == "expand":
            inputs = self.augmented_inputs()
        else:
            inputs = self.mean_inputs()[:, None]
            if weights is not None:
                total = jnp.mean(weights, axis=1, keepdims=True)
                weights = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
        if weights is not None:
            inputs = jnp.sqrt(weights)[:, :, None, None] * inputs
        left = jnp.moveaxis(inputs, 2, 0).reshape(self.num_groups, -1, self.fan_in)
        return left, self.unit_rows(sharing)

    def mean_inputs(self) -> Array:
        """The weighted mean of the inputs over positions, shape (N, G, fan_in)."""
        inputs = self.augmented_inputs()
        if self.row_weights is not None:
            inputs = self.row_weights[:, :, None, None] * inputs
        return jnp.mean(inputs, axis=1)

    def unit_rows(self, sharing: Sharing) -> Array:
        """The second array of ``rows``."""
        derivatives = self.derivatives
        if sharing == "reduce":
            derivatives = jnp.sum(derivatives, axis=2, keepdims=True)
        groups, units = derivatives.shape[3:]
        return jnp.moveaxis(derivatives, 3, 0).reshape(groups, -1, units)

    def unit_squares(self) -> Array:
        """The diagonal of the product of ``unit_rows("expand")``, all groups in a row, (M,)."""
        return jnp.sum(self.derivatives**2, axis=(0, 1, 2)).reshape(-1)

    def weighed(self, weights: Array) -> Self:
        """The layer in ``weigh_rows``."""
        mean = jnp.mean(weights, axis=1)
        everywhere = jnp.broadcast_to(mean[:, None], (len(mean), self.num_positions))
        if self.num_positions != weights.shape[1]:
            return dataclasses.replace(self, row_weights=everywhere)
        used = jnp.any(self.derivatives != 0, axis=(1, 3, 4))
        masked = jnp.where(used, everywhere, 0)
        return dataclasses.replace(self, row_weights=jnp.where(weights > 0, weights, masked))


def weigh_rows(signals: Signals, weights: Array) -> Signals:
    """Signals whose inputs count in Kronecker factors as the outputs do.

    A sample counts by the mean weight of its outputs. Where a layer has as many positions as the
    outputs, each counts by the weight of the output in its place; one that is masked there, but
    that other outputs depend on (a prompt), counts by the mean of its sample.

    Args:
      signals: of a batch or of a microbatch.
      weights: of the outputs, (N, T), of mean 1 over the whole batch.
    """

    def weighed(layer: LayerSignals) -> LayerSignals:
        if isinstance(layer, DenseSignals):
            return dataclasses.replace(layer, row_weights=jnp.mean(weights, axis=1))
        return layer.weighed(weights) if isinstance(layer, SharedSignals) else layer

    layers = tuple(layer.each(weighed) for layer in signals.layers)
    return Signals(layers, signals.outputs, jnp.any(weights > 0, axis=1))
