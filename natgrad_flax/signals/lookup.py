"""Signals of a table whose rows are looked up: an embedding, without one-hot rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.signals.base import LayerUpdate
from natgrad_flax.signals.shared import SharedSignals, Sharing


@partial(
    jax.tree_util.register_dataclass, data_fields=["indices"], meta_fields=["num_rows", "scale"]
)
@dataclass(frozen=True)
class OneHot:
    """One-hot inputs by the place of their one.

    Attributes:
      indices: shape (N, T); ``num_rows`` where a row is zero.
      num_rows: K, of the table.
      scale: what stands in place of the one.
    """

    indices: Array
    num_rows: int
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T, 1, K): of the inputs of one group of units."""
        return (*self.indices.shape, 1, self.num_rows)

    def dense(self, dtype: Any) -> Array:
        """The inputs themselves, shape (N, T, 1, K)."""
        return self.scale * jax.nn.one_hot(self.indices[:, :, None], self.num_rows, dtype=dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "derivatives", "row_weights"],
    meta_fields=["bias_scale", "path", "kernel_form", "bias_form"],
)
@dataclass(frozen=True)
class LookupSignals(SharedSignals):
    """Signals of a table (K, M) of which T rows are taken, u_t = scale W[index_t].

    The same as ``SharedSignals`` with one-hot inputs, one group and no bias; nothing here has the
    size N T K but what asks for the Jacobian itself or for ``rows`` of "expand". The input factor
    of K-FAC "expand" is a diagonal: how often each row was looked up.

    Attributes:
      inputs: which rows.
      derivatives: D, shape (N, S, T, 1, M).
      row_weights: as in ``SharedSignals``.
    """

    inputs: Any

    def dense(self) -> SharedSignals:
        """The same with one-hot inputs, N T K numbers."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inputs = self.inputs.dense(self.derivatives.dtype)
        return SharedSignals(**{**fields, "inputs": inputs})

    def augmented_inputs(self) -> Array:
        """One-hot rows, shape (N, T, 1, K)."""
        return self.inputs.dense(self.derivatives.dtype)

    def jacobian(self) -> Array:
        """J_l as (N, S, K, M)."""

        def sample(derivatives: Array, indices: Array) -> Array:
            start = jnp.zeros((self.fan_in, self.num_units), derivatives.dtype)
            return start.at[indices].add(self.inputs.scale * derivatives, mode="drop")

        along = jax.vmap(sample, in_axes=(0, None))
        return jax.vmap(along)(self.derivatives[:, :, :, 0], self.inputs.indices)

    def pairs_are_cheaper(self, other: SharedSignals | None = None) -> bool:
        """Always, as the inputs of a pair are the same or orthogonal."""
        del other
        return True

    def gram(self, other: Any = None) -> Array:
        """J_l J'_l^T, shape (N S, N' S')."""
        second: LookupSignals = self if other is None else other
        same = self._meet(self.inputs.indices[:, :, None, None], second.inputs.indices)
        units = jnp.einsum(
            "nstm,prum->nstpru", self.derivatives[:, :, :, 0], second.derivatives[:, :, :, 0]
        )
        gram = second.inputs.scale * jnp.einsum("ntpu,nstpru->nspr", same, units)
        return gram.reshape(self.num_samples * self.num_directions, -1)

    def _summed(self) -> Array:
        """The derivatives of all positions that look up the same row, at each, (N, S, T, M)."""
        indices = self.inputs.indices
        same = self.inputs.scale * self._meet(indices[:, :, None], indices[:, None])
        return jnp.einsum("ntu,nsum->nstm", same, self.derivatives[:, :, :, 0])

    def _meet(self, indices: Array, others: Array) -> Array:
        """The scale where two indices are of the same row, else 0; shapes are broadcast."""
        same = (indices == others) & (indices < self.inputs.num_rows)
        return self.inputs.scale * same.astype(self.derivatives.dtype)

    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""
        return jnp.einsum("nstm,nstm->ns", self._summed(), self.derivatives[:, :, :, 0])

    def squares(self) -> LayerUpdate:
        """sum_n sum_s J_l^2, entry by entry."""
        # sum_t D_t summed_t is summed^2 once for every row, spread over its positions
        products = jnp.sum(self._summed() * self.derivatives[:, :, :, 0], axis=1)
        return {"kernel": self._scattered(products)}

    def local_vjp(self, cotangents: Array) -> LayerUpdate:
        """sum_nt of the cotangents (N, T, 1, M) that belong to each row."""
        return {"kernel": self._scattered(self.inputs.scale * cotangents[:, :, 0])}

    def _scattered(self, values: Array) -> Array:
        """The sum over positions of values (N, T, M) at the rows that they look up, (K, M)."""
        start = jnp.zeros((self.fan_in, self.num_units), values.dtype)
        return start.at[self.inputs.indices].add(values, mode="drop")

    def local_jvp(self, update: LayerUpdate) -> Array:
        """The change of what is looked up, shape (N, T, 1, M)."""
        moved = update["kernel"].at[self.inputs.indices].get(mode="fill", fill_value=0)
        return (self.inputs.scale * moved)[:, :, None]

    def has_diagonal_inputs(self, sharing: str) -> bool:
        """With "expand", as every row is one-hot."""
        return sharing == "expand"

    def row_norms(self, sharing: Sharing) -> tuple[Array, Array]:
        """See ``SharedSignals.row_norms``."""
        if sharing == "reduce":
            return super().row_norms(sharing)
        return jnp.sum(self.counts()), jnp.sum(self.derivatives**2)

    def mean_inputs(self) -> Array:
        """See ``SharedSignals.mean_inputs``; N K numbers, whatever the number of positions."""
        start = jnp.zeros((self.num_samples, self.fan_in), self.derivatives.dtype)
        share = self.inputs.scale / self.num_positions * self._position_weights()
        samples = jnp.arange(self.num_samples)[:, None]
        return start.at[samples, self.inputs.indices].add(share, mode="drop")[:, None]

    def _position_weights(self) -> Array:
        if self.row_weights is not None:
            return self.row_weights
        return jnp.ones(self.inputs.indices.shape, self.derivatives.dtype)

    def counts(self) -> Array:
        """The diagonal of a^T a, shape (K,): how often, by weight, each row is looked up."""
        weights = self._position_weights()
        start = jnp.zeros(self.fan_in, self.derivatives.dtype)
        return start.at[self.inputs.indices].add(self.inputs.scale**2 * weights, mode="drop")
