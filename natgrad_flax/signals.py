"""Per-layer signals (a, D): all that any Fisher structure or empirical kernel needs.

For an affine layer u = a W~ with scaled inputs a and outputs f of the whole network, the Jacobian
of S weighted outputs is J[(n,s), (j,i)] = a[n,j] D[n,s,i] (science: section 0). Nothing of the
size of a Jacobian is ever built: Gram matrices, products and updates are formulas over (a, D).
Layers whose weights are shared by many positions have signals of their own in ``shared_signals``.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.linalg import symmetric_product

LayerUpdate = dict[str, Array]
"""A step in the parameters of one layer: ``kernel`` (K, M) and, with a bias, ``bias`` (M,).

This form is the same for all layers; ``LayerSignals.parameters`` gives the layer's own names and
shapes.
"""


class ParameterForm(NamedTuple):
    """How the parameter of a layer is laid out beside its matrix of (inputs, units).

    Attributes:
      name: of the parameter in its module.
      shape: of the parameter.
      split: sizes into which the matrix is reshaped, in its own order of axes.
      order: for each axis of the parameter the place of its axis in ``split``.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def plain(cls, name: str, shape: tuple[int, ...]) -> ParameterForm:
        """A parameter that is its matrix, reshaped at most."""
        return cls(name, shape, shape, tuple(range(len(shape))))

    def to_parameter(self, matrix: Array) -> Array:
        """From (..., units) to the shape of the parameter."""
        return matrix.reshape(self.split).transpose(self.order).reshape(self.shape)

    def to_matrix(self, parameter: Array, shape: tuple[int, ...]) -> Array:
        """From the parameter to a matrix of a given shape."""
        moved = parameter.reshape([self.split[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(shape)


class LayerSignals(abc.ABC):
    """Signals of one layer on a batch of N samples and S seeds.

    The layer has ``num_units`` units of ``fan_in`` parameters each, of which the last belongs to
    the bias where there is one. A direction is what the layer sees of a cotangent of the outputs,
    sample by sample; its shape is the layer's own affair.
    """

    path: tuple[str | int, ...]
    bias_scale: float | None
    kernel_form: ParameterForm | None
    bias_form: ParameterForm | None

    @property
    @abc.abstractmethod
    def num_samples(self) -> int:
        """N."""

    @property
    @abc.abstractmethod
    def num_seeds(self) -> int:
        """S, the number of output directions a sample."""

    @property
    @abc.abstractmethod
    def num_units(self) -> int:
        """M."""

    @property
    @abc.abstractmethod
    def fan_in(self) -> int:
        """K, plus 1 with a bias: parameters a unit."""

    @abc.abstractmethod
    def take_seeds(self, start: int, stop: int) -> LayerSignals:
        """The same signals with some of the seeds only."""

    @abc.abstractmethod
    def reseed(self, factor: Array) -> LayerSignals:
        """The signals of sum_s R[n,s,r] f[n,s] as seeds r, for R of shape (N, S, S')."""

    @abc.abstractmethod
    def direction(self, seed: int) -> Array:
        """The direction of one seed."""

    @abc.abstractmethod
    def gram(self, other: Any = None) -> Array:
        """K_l = J_l J'_l^T, shape (N S, N' S'); no 1/N."""

    @abc.abstractmethod
    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""

    @abc.abstractmethod
    def combine(self, coefficients: Array) -> Array:
        """The direction of sum_s v[n,s] f[n,s] for v of shape (N, S)."""

    @abc.abstractmethod
    def pull_back(self, directions: Array) -> LayerUpdate:
        """From a direction to the parameters: sum_n J_n^T of it."""

    @abc.abstractmethod
    def push_forward(self, update: LayerUpdate) -> Array:
        """The dual of ``pull_back``: <pull_back(R), u> is the inner product of R with this."""

    @abc.abstractmethod
    def jvp(self, update: LayerUpdate) -> Array:
        """J_l applied to a step in the parameters, shape (N, S)."""

    @abc.abstractmethod
    def jacobian(self) -> Array:
        """J_l as (N, S, fan_in, M), the row of the bias last."""

    @abc.abstractmethod
    def squares(self) -> LayerUpdate:
        """sum_n sum_s J_l^2, entry by entry."""

    def gram_times(self, directions: Array) -> Array:
        """J_l applied to the parameters that a direction pulls back to, shape (N, S)."""
        return self.jvp(self.pull_back(directions))

    def vjp(self, coefficients: Array) -> LayerUpdate:
        """J_l^T v for v of shape (N, S)."""
        return self.pull_back(self.combine(coefficients))

    @property
    def num_params(self) -> int:
        """P_l."""
        return self.fan_in * self.num_units

    def to_dense(self) -> Array:
        """The Jacobian, shape (N S, P_l): rows n-major, columns kernel row by row, then bias."""
        return self.jacobian().reshape(-1, self.num_params)

    def update(self, matrix: Array) -> LayerUpdate:
        """A matrix (fan_in, M) as kernel and bias."""
        if self.bias_scale is None:
            return {"kernel": matrix}
        return {"kernel": matrix[:-1], "bias": matrix[-1]}

    def unravel(self, vector: Array) -> LayerUpdate:
        """The inverse of the column order of ``to_dense``: (P_l,) to parameters."""
        return self.update(vector.reshape(self.fan_in, self.num_units))

    def parameters(self, update: LayerUpdate) -> dict[str, Array]:
        """An update under the names and in the shapes of the layer's own parameters."""
        forms = {"kernel": self.kernel_form, "bias": self.bias_form}
        named = {}
        for key, leaf in update.items():
            form = forms[key]
            named[form.name if form else key] = form.to_parameter(leaf) if form else leaf
        return named

    def from_parameters(self, named: Mapping[Any, Array]) -> LayerUpdate:
        """The inverse of ``parameters``; names that are not this layer's are passed by."""
        inputs = self.fan_in - (self.bias_scale is not None)
        shapes = {"kernel": (inputs, self.num_units), "bias": (self.num_units,)}
        forms = {"kernel": self.kernel_form, "bias": self.bias_form}
        if self.bias_scale is None:
            del forms["bias"]
        return {
            key: form.to_matrix(named[form.name], shapes[key]) if form else named[key]
            for key, form in forms.items()
        }


def named_updates(
    layers: Sequence[LayerSignals], updates: Sequence[LayerUpdate]
) -> dict[tuple[str | int, ...], dict[str, Array]]:
    """Updates of layers by the paths of the modules and the names of their parameters."""
    named: dict[tuple[str | int, ...], dict[str, Array]] = {}
    for layer, update in zip(layers, updates, strict=True):
        named.setdefault(layer.path, {}).update(layer.parameters(update))
    return named


def layer_updates(
    layers: Sequence[LayerSignals], parameters: dict[tuple[str | int, ...], Array]
) -> tuple[LayerUpdate, ...]:
    """The inverse of ``named_updates``, from arrays by the paths of parameters."""
    return tuple(
        layer.from_parameters(
            {path[-1]: leaf for path, leaf in parameters.items() if path[:-1] == layer.path}
        )
        for layer in layers
    )


def matrix_of(update: LayerUpdate) -> Array:
    """Kernel and bias as one matrix (fan_in, M), the bias last."""
    if "bias" not in update:
        return update["kernel"]
    return jnp.concatenate([update["kernel"], update["bias"][None]])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "derivatives"],
    meta_fields=["bias_scale", "path", "kernel_form", "bias_form"],
)
@dataclass(frozen=True)
class DenseSignals(LayerSignals):
    """Signals of one affine layer that is called once, on one position a sample.

    Attributes:
      inputs: a, shape (N, K): inputs of the layer times the scale of its weights.
      derivatives: D, shape (N, S, M): derivative of the S seeded outputs of each sample with
        respect to the M pre-activations of that sample.
      bias_scale: the factor in front of the bias, None where the layer has no bias.
      path: where the layer stands in the model.
      kernel_form: layout of the kernel, None where it is called kernel and is (K, M).
      bias_form: layout of the bias, None where it is called bias and is (M,).
    """

    inputs: Array
    derivatives: Array
    bias_scale: float | None
    path: tuple[str | int, ...]
    kernel_form: ParameterForm | None = None
    bias_form: ParameterForm | None = None

    @property
    def num_samples(self) -> int:
        """N."""
        return self.inputs.shape[0]

    @property
    def num_seeds(self) -> int:
        """S, the number of output directions a sample."""
        return self.derivatives.shape[1]

    @property
    def num_units(self) -> int:
        """M."""
        return self.derivatives.shape[2]

    @property
    def fan_in(self) -> int:
        """K, plus 1 with a bias: parameters a unit."""
        return self.inputs.shape[1] + (self.bias_scale is not None)

    def take_seeds(self, start: int, stop: int) -> DenseSignals:
        """The same signals with some of the seeds only."""
        return dataclasses.replace(self, derivatives=self.derivatives[:, start:stop])

    def reseed(self, factor: Array) -> DenseSignals:
        """The same layer with combinations of its seeds, R of shape (N, S, S')."""
        mixed = jnp.einsum("nsr,nsm->nrm", factor, self.derivatives)
        return dataclasses.replace(self, derivatives=mixed)

    def direction(self, seed: int) -> Array:
        """D of one seed, shape (N, M)."""
        return self.derivatives[:, seed]

    def augmented_inputs(self) -> Array:
        """a with the column of the bias last, shape (N, fan_in)."""
        if self.bias_scale is None:
            return self.inputs
        column = jnp.full((self.num_samples, 1), self.bias_scale, self.inputs.dtype)
        return jnp.concatenate([self.inputs, column], axis=1)

    def flat_derivatives(self) -> Array:
        """D with samples and seeds in one axis, n-major, shape (N S, M)."""
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

    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""
        return self.input_norms()[:, None] * self.derivative_norms()

    def gram(self, other: DenseSignals | None = None) -> Array:
        """K_l = J_l J'_l^T, shape (N S, N' S'); no 1/N."""
        other_seeds = self.num_seeds if other is None else other.num_seeds
        inputs = self.input_gram(other)
        return self.derivative_gram(other) * expand_samples(inputs, self.num_seeds, other_seeds)

    def gram_times(self, directions: Array) -> Array:
        """J_l applied to J_l^T-type directions: (N, M) pre-activation cotangents -> (N, S)."""
        mixed = self.input_gram() @ directions
        return jnp.einsum("nsm,nm->ns", self.derivatives, mixed)

    def combine(self, coefficients: Array) -> Array:
        """sum_s v[n,s] D[n,s,:], shape (N, M)."""
        return jnp.einsum("ns,nsm->nm", coefficients, self.derivatives)

    def pull_back(self, directions: Array) -> LayerUpdate:
        """a^T R for pre-activation cotangents R (N, M): the parameter-shaped product."""
        update = {"kernel": self.inputs.T @ directions}
        if self.bias_scale is not None:
            update["bias"] = self.bias_scale * jnp.sum(directions, axis=0)
        return update

    def jvp(self, update: LayerUpdate) -> Array:
        """J_l applied to a step in the parameters, shape (N, S)."""
        return jnp.einsum("nsm,nm->ns", self.derivatives, self.push_forward(update))

    def push_forward(self, update: LayerUpdate) -> Array:
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


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "outputs"], meta_fields=[])
@dataclass(frozen=True)
class Signals:
    """Signals of every layer of a network on one batch, in forward order.

    Attributes:
      layers: one entry a layer.
      outputs: f, shape (N, C).
    """

    layers: tuple[LayerSignals, ...]
    outputs: Array

    @property
    def num_samples(self) -> int:
        """N."""
        return self.outputs.shape[0]

    @property
    def num_seeds(self) -> int:
        """S."""
        return self.layers[0].num_seeds

    @property
    def size(self) -> int:
        """N S, the side of every Gram matrix."""
        return self.num_samples * self.num_seeds

    @property
    def num_params(self) -> int:
        """P."""
        return sum(layer.num_params for layer in self.layers)

    def take_seeds(self, count: int) -> Signals:
        """The same signals with the first ``count`` seeds only."""
        return Signals(tuple(layer.take_seeds(0, count) for layer in self.layers), self.outputs)

    def gram(self, other: Signals | None = None) -> Array:
        """K = sum_l K_l, shape (N S, N' S'); no 1/N."""
        others: Sequence[LayerSignals | None]
        others = [None] * len(self.layers) if other is None else other.layers
        grams = [a.gram(b) for a, b in zip(self.layers, others, strict=True)]
        return sum(grams[1:], start=grams[0])

    def to_dense(self) -> Array:
        """The Jacobian, shape (N S, P), layer after layer."""
        return jnp.concatenate([layer.to_dense() for layer in self.layers], axis=1)

    def unravel(self, vector: Array) -> tuple[LayerUpdate, ...]:
        """A vector (P,) in the column order of ``to_dense`` as one update a layer."""
        ends = np.cumsum([layer.num_params for layer in self.layers])
        parts = jnp.split(vector, ends[:-1])
        return tuple(a.unravel(b) for a, b in zip(self.layers, parts, strict=True))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["coefficients", "directions"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Residual:
    """The loss residual r, ready for the solvers: J^T r / N is the gradient.

    Either r lies in the span of the seeds that the Fisher is built of, r_n = R_n w_n; then
    ``coefficients`` is w and the gradient is (R^T J)^T w / N. Or it does not (a Monte-Carlo
    Fisher); then ``directions`` holds the residual carried back to each layer.

    Attributes:
      coefficients: w, shape (N, S), or None.
      directions: for each layer the direction of r, shape (N, M_l) for dense signals, or None.
    """

    coefficients: Array | None
    directions: tuple[Array, ...] | None

    def direction(self, layer: LayerSignals, index: int) -> Array:
        """The residual carried back to a layer, shape (N, M_l) for dense signals."""
        if self.directions is not None:
            return self.directions[index]
        assert self.coefficients is not None
        return layer.combine(self.coefficients)


def expand_samples(gram: Array, rows: int, columns: int) -> Array:
    """An (N, N') array as (N rows, N' columns), every entry repeated; n-major."""
    n, m = gram.shape
    blown = jnp.broadcast_to(gram[:, None, :, None], (n, rows, m, columns))
    return blown.reshape(n * rows, m * columns)
