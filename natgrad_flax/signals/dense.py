"""Per-layer signals (a, D): all that any Fisher structure or empirical kernel needs.

For an affine layer u = a W~ with scaled inputs a and outputs f of the whole network, the Jacobian
of S weighted outputs is J[(n,s), (j,i)] = a[n,j] D[n,s,i] (science: section 0). Nothing of the
size of a Jacobian is ever built: Gram matrices, products and updates are formulas over (a, D).
Layers whose weights are shared by many positions have signals of their own in ``shared``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from natgrad_flax.arguments.renamed import Renamed
from natgrad_flax.linalg.dense import symmetric_blocks, symmetric_product
from natgrad_flax.linalg.execution import by_rows, many_devices
from natgrad_flax.signals.base import (
    AffineLayerSignals,
    LayerSignals,
    LayerUpdate,
    ParameterForm,
    dense_jacobian,
    unravel,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "derivatives", "row_weights"],
    meta_fields=["bias_scale", "path", "kernel_form", "bias_form"],
)
@dataclass(frozen=True)
class DenseSignals(AffineLayerSignals):
    """Signals of one affine layer that is called once, on one position a sample.

    Attributes:
      inputs: a, shape (N, K): inputs of the layer times the scale of its weights.
      derivatives: D, shape (N, S, M): derivative of the S outputs of each sample with
        respect to the M pre-activations of that sample.
      bias_scale: the factor in front of the bias, None where the layer has no bias.
      path: where the layer stands in the model.
      kernel_form: layout of the kernel, None where it is called kernel and is (K, M).
      bias_form: layout of the bias, None where it is called bias and is (M,).
      row_weights: how much the inputs of a sample count in a Kronecker factor, (N,) of mean 1 over
        the whole batch; None where all count the same.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> signals = ng.jacobian_signals(ng.MLP((4, 8, 2), rngs=nnx.Rngs(0)), jnp.eye(4))
      >>> a, D = signals.layers[1].inputs, signals.layers[1].derivatives
      >>> a.shape, D.shape
      ((4, 8), (4, 2, 2))
      >>> A, B = jnp.einsum("nk,mk->nm", a, a), jnp.einsum("nsi,mti->nsmt", D, D)
      >>> K = A[:, None, :, None] * B
      >>> bool(jnp.allclose(signals.layers[1].gram(), K.reshape(8, 8), atol=1e-5))
      True
    """

    inputs: Array
    derivatives: Array
    bias_scale: float | None
    path: tuple[str | int, ...]
    kernel_form: ParameterForm | None = None
    bias_form: ParameterForm | None = None
    row_weights: Array | None = None

    @property
    def gram_by(self) -> str:
        """Inputs and units."""
        return "inputs and units"

    @property
    def num_units(self) -> int:
        """M."""
        return self.derivatives.shape[2]

    def mix_directions(self, factor: Array) -> DenseSignals:
        """The same layer with combinations of its output directions, R of shape (N, S, S')."""
        mixed = jnp.einsum("nsr,nsm->nrm", factor, self.derivatives)
        return dataclasses.replace(self, derivatives=mixed)

    def flat_derivatives(self) -> Array:
        """D with samples and output directions in one axis, n-major, shape (N S, M)."""
        return self.derivatives.reshape(-1, self.num_units)

    def input_gram(self, other: DenseSignals | None = None) -> Array:
        """a a'^T with the bias, shape (N, N'); no 1/N."""
        right = self.inputs if other is None else other.inputs
        gram = self.inputs @ right.T
        return gram if self.bias_scale is None else gram + self.bias_scale**2

    def derivative_gram(self, other: DenseSignals | None = None) -> Array:
        """D D'^T over units, shape (N S, N' S'); no 1/N."""
        flat = self.flat_derivatives()
        if other is not None:
            return flat @ other.flat_derivatives().T
        return symmetric_product(flat)

    def input_norms(self) -> Array:
        """The diagonal of ``input_gram``, shape (N,)."""
        norms = jnp.sum(self.inputs**2, axis=1)
        return norms if self.bias_scale is None else norms + self.bias_scale**2

    def derivative_norms(self) -> Array:
        """The diagonal of ``derivative_gram``, shape (N, S)."""
        return jnp.sum(self.derivatives**2, axis=2)

    def derivative_sums(self) -> Array:
        """Squared norms of D_n, of all output directions together, shape (N,)."""
        return jnp.sum(self.derivative_norms(), axis=1)

    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""
        return self.input_norms()[:, None] * self.derivative_norms()

    def gram(self, other: DenseSignals | None = None) -> Array:
        """K_l = J_l J'_l^T, shape (N S, N' S'); no 1/N."""
        other_seeds = self.num_directions if other is None else other.num_directions
        inputs = self.input_gram(other)
        return self.derivative_gram(other) * expand_samples(
            inputs, self.num_directions, other_seeds
        )

    def gram_times(self, cotangents: Array) -> Array:
        """J_l J_l^T-like: from cotangents of the pre-activations (N, M) to (N, S)."""
        mixed = self.input_gram() @ cotangents
        return jnp.einsum("nsm,nm->ns", self.derivatives, mixed)

    def combine(self, coefficients: Array) -> Array:
        """sum_s v[n,s] D[n,s,:], shape (N, M)."""
        return jnp.einsum("ns,nsm->nm", coefficients, self.derivatives)

    def local_vjp(self, cotangents: Array) -> LayerUpdate:
        """a^T R for pre-activation cotangents R (N, M): the parameter-shaped product."""
        update = {"kernel": self.inputs.T @ cotangents}
        if self.bias_scale is not None:
            update["bias"] = self.bias_scale * jnp.sum(cotangents, axis=0)
        return update

    def jvp(self, update: LayerUpdate) -> Array:
        """J_l applied to a step in the parameters, shape (N, S)."""
        return jnp.einsum("nsm,nm->ns", self.derivatives, self.local_jvp(update))

    def local_jvp(self, update: LayerUpdate) -> Array:
        """The change of the pre-activations under a step in the parameters, shape (N, M)."""
        moved = self.inputs @ update["kernel"]
        return moved if self.bias_scale is None else moved + self.bias_scale * update["bias"]

    def jacobian(self) -> Array:
        """J_l as (N, S, fan_in, M)."""
        return jnp.einsum("nsm,nk->nskm", self.derivatives, self.augmented_inputs())

    def squares(self) -> LayerUpdate:
        """sum_n sum_s J_l^2, entry by entry, without the Jacobian."""
        square = jnp.sum(self.derivatives**2, axis=1)
        entries = {"kernel": (self.inputs**2).T @ square}
        if self.bias_scale is not None:
            entries["bias"] = self.bias_scale**2 * jnp.sum(square, axis=0)
        return entries


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "outputs", "counted"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Signals:
    """Signals of every layer of a network on one batch, in forward order.

    Those of a dense layer are its scaled inputs a (N, K) and the derivatives D (N, S, M) of S
    output directions by its M pre-activations; its Jacobian is a[n, k] D[n, s, m].

    Attributes:
      layers: one entry a layer.
      outputs: f, shape (N, ..., C).
      counted: which samples have a weight other than 0, (N,); None where none has weights.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> signals = ng.jacobian_signals(ng.MLP((4, 8, 2), rngs=nnx.Rngs(0)), jnp.eye(4))
      >>> # J J^T, samples first
      >>> ntk = sum(layer.gram() for layer in signals.layers)
      >>> ntk.shape, signals.num_params
      ((8, 8), 48)
    """

    layers: tuple[LayerSignals, ...]
    outputs: Array
    counted: Array | None = None

    num_seeds = Renamed("num_directions")
    take_seeds = Renamed("take_directions")
    reseed = Renamed("mix_directions")

    @property
    def num_samples(self) -> int:
        """N."""
        return self.outputs.shape[0]

    @property
    def num_counted(self) -> int | Array:
        """N without samples of weight 0, whose inputs count in no Kronecker factor."""
        if self.counted is None:
            return self.num_samples
        # an integer leaves the dtype of what it multiplies
        return jnp.maximum(jnp.sum(self.counted, dtype=jnp.int32), 1)

    @property
    def num_directions(self) -> int:
        """S."""
        return self.layers[0].num_directions

    @property
    def size(self) -> int:
        """N S, the side of every Gram matrix."""
        return self.num_samples * self.num_directions

    @property
    def num_params(self) -> int:
        """P."""
        return sum(layer.num_params for layer in self.layers)

    def take_directions(self, count: int) -> Signals:
        """The same signals with the first ``count`` output directions only."""
        layers = tuple(layer.take_directions(0, count) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def mix_directions(self, factor: Array) -> Signals:
        """The signals of sum_s R[n,s,r] f[n,s] as output directions, for R of shape (N, S, S')."""
        layers = tuple(layer.mix_directions(factor) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def gram(self, other: Signals | None = None) -> Array:
        """K = sum_l K_l, shape (N S, N' S'); no 1/N."""
        others: Sequence[LayerSignals | None]
        others = [None] * len(self.layers) if other is None else other.layers
        grams = [a.gram(b) for a, b in zip(self.layers, others, strict=True)]
        return sum(grams[1:], start=grams[0])

    def to_dense(self) -> Array:
        """The Jacobian, shape (N S, P), layer after layer."""
        return dense_jacobian(self.layers)

    def unravel(self, vector: Array) -> tuple[LayerUpdate, ...]:
        """A vector (P,) in the column order of ``to_dense`` as one update a layer."""
        return unravel(self.layers, vector)


def symmetric_gram(layers: Sequence[LayerSignals]) -> Array:
    """sum_l K_l, shape (N S, N S); no 1/N.

    Of several wide layers by pairs of blocks of samples, in one loop that adds the layers up.
    """
    n, s = layers[0].num_samples, layers[0].num_directions
    dense = all(isinstance(layer, DenseSignals) for layer in layers)
    wide = max(layer.num_units for layer in layers) >= 256 and n * s >= 512 and n >= 8
    if dense and wide and len(layers) > 1 and not many_devices():
        return _gram_of_blocks(tuple(layers))
    return _whole_gram(layers)


def _whole_gram(layers: Sequence[LayerSignals]) -> Array:
    grams = [by_rows(layer.gram()) for layer in layers]
    return sum(grams[1:], start=grams[0])


@jax.custom_jvp
def _gram_of_blocks(layers: tuple[DenseSignals, ...]) -> Array:
    n, s = layers[0].num_samples, layers[0].num_directions
    pairs = [(layer.derivatives, layer.input_gram()) for layer in layers]

    def block(row: Array, column: Array, side: int) -> Array:
        total = jnp.zeros((), layers[0].derivatives.dtype)
        for derivatives, gram in pairs:
            left, right = (
                lax.dynamic_slice_in_dim(derivatives, at, side).reshape(side * s, -1)
                for at in (row, column)
            )
            inputs = lax.dynamic_slice(gram, (row, column), (side, side))
            total = total + left @ right.T * expand_samples(inputs, s, s)
        return total

    return symmetric_blocks(block, n, s, layers[0].derivatives.dtype)


@_gram_of_blocks.defjvp
def _gram_of_blocks_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _gram_of_blocks(*primals), jax.jvp(_whole_gram, primals, tangents)[1]


def expand_samples(gram: Array, rows: int, columns: int) -> Array:
    """An (N, N') array as (N rows, N' columns), every entry repeated; n-major."""
    n, m = gram.shape
    blown = jnp.broadcast_to(gram[:, None, :, None], (n, rows, m, columns))
    return blown.reshape(n * rows, m * columns)
