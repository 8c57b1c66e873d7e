"""What the signals of a layer answer, whatever kind of layer it is, and updates of parameters."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.renamed import Renamed

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
      part: the place along first axes of its own, of which ``shape`` says nothing, where the
        parameter holds those of several layers.
      lead: sizes of these axes.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    part: int | None = None
    lead: tuple[int, ...] = ()

    @classmethod
    def plain(cls, name: str, shape: tuple[int, ...]) -> ParameterForm:
        """A parameter that is its matrix, reshaped at most."""
        return cls(name, shape, shape, tuple(range(len(shape))))

    def to_parameter(self, matrix: Array) -> Array:
        """From (..., units) to the shape of the parameter."""
        return matrix.reshape(self.split).transpose(self.order).reshape(self.shape)

    def to_matrix(self, parameter: Array, shape: tuple[int, ...]) -> Array:
        """From the parameter to a matrix of a given shape."""
        if self.part is not None:
            parameter = self.along_one_axis(parameter)[self.part]
        moved = parameter.reshape([self.split[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(shape)

    def along_one_axis(self, parameter: Array) -> Array:
        """A parameter of several layers, (layers, *shape)."""
        return parameter.reshape(-1, *self.shape)


class LayerSignals(abc.ABC):
    """Signals of one layer on a batch of N samples and S output directions.

    The layer has ``num_units`` units of ``fan_in`` parameters each, of which the last belongs to
    the bias where there is one. Its cotangent is what the layer sees of a cotangent of the outputs,
    sample by sample; its shape is the layer's own affair.
    """

    path: tuple[str | int, ...]
    bias_scale: float | None
    kernel_form: ParameterForm | None
    bias_form: ParameterForm | None

    num_seeds = Renamed("num_directions")
    take_seeds = Renamed("take_directions")
    reseed = Renamed("mix_directions")
    direction = Renamed("cotangent")
    pull_back = Renamed("local_vjp")
    push_forward = Renamed("local_jvp")

    @property
    def gram_by(self) -> str:
        """What the Gram matrix is built from, in words."""
        return "Jacobians"

    @property
    @abc.abstractmethod
    def num_samples(self) -> int:
        """N."""

    @property
    @abc.abstractmethod
    def num_directions(self) -> int:
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
    def take_directions(self, start: int, stop: int) -> LayerSignals:
        """The same signals with some of the output directions only."""

    @abc.abstractmethod
    def mix_directions(self, factor: Array) -> LayerSignals:
        """The signals of sum_s R[n,s,r] f[n,s] as output directions, for R of shape (N, S, S')."""

    def each(self, function: Callable[[LayerSignals], LayerSignals]) -> LayerSignals:
        """What a function makes of these signals; of stacked ones layer by layer."""
        return function(self)

    @abc.abstractmethod
    def cotangent(self, index: int) -> Array:
        """The cotangent of one output direction."""

    @abc.abstractmethod
    def gram(self, other: Any = None) -> Array:
        """K_l = J_l J'_l^T, shape (N S, N' S'); no 1/N."""

    @abc.abstractmethod
    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""

    @abc.abstractmethod
    def combine(self, coefficients: Array) -> Array:
        """The cotangent of sum_s v[n,s] f[n,s] for v of shape (N, S)."""

    @abc.abstractmethod
    def local_vjp(self, cotangents: Array) -> LayerUpdate:
        """From a cotangent of the layer to its parameters, summed over samples."""

    @abc.abstractmethod
    def local_jvp(self, update: LayerUpdate) -> Array:
        """The dual of ``local_vjp``: <local_vjp(R), u> is the inner product of R with this."""

    @abc.abstractmethod
    def jvp(self, update: LayerUpdate) -> Array:
        """J_l applied to a step in the parameters, shape (N, S)."""

    @abc.abstractmethod
    def jacobian(self) -> Array:
        """J_l as (N, S, fan_in, M), the row of the bias last."""

    @abc.abstractmethod
    def squares(self) -> LayerUpdate:
        """sum_n sum_s J_l^2, entry by entry."""

    def gram_times(self, cotangents: Array) -> Array:
        """J_l applied to the ``local_vjp`` of a cotangent, shape (N, S)."""
        return self.jvp(self.local_vjp(cotangents))

    def vjp(self, coefficients: Array) -> LayerUpdate:
        """J_l^T v for v of shape (N, S)."""
        return self.local_vjp(self.combine(coefficients))

    @property
    def forms(self) -> list[ParameterForm]:
        """Layouts of its parameters."""
        return [form for form in (self.kernel_form, self.bias_form) if form]

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

    def parts(self) -> dict[str, int | tuple[int, int] | None]:
        """By the names of the parameters which part of them is this layer's, None for all.

        One along first axes of its own, or those from a first one to a last one, not included.
        """
        return {form.name: form.part for form in self.forms}

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


class AffineLayerSignals(LayerSignals):
    """Signals of an affine layer: scaled inputs a (N, ..., K) and derivatives D (N, S, ...)."""

    inputs: Array
    derivatives: Array

    @property
    def num_samples(self) -> int:
        """N."""
        return self.inputs.shape[0]

    @property
    def num_directions(self) -> int:
        """S, the number of output directions a sample."""
        return self.derivatives.shape[1]

    @property
    def fan_in(self) -> int:
        """K, plus 1 with a bias: parameters a unit."""
        return self.inputs.shape[-1] + (self.bias_scale is not None)

    def has_diagonal_inputs(self, sharing: str) -> bool:
        """Whether the input factor of K-FAC with this sharing is a diagonal whatever the batch."""
        del sharing
        return False

    def take_directions(self, start: int, stop: int) -> Self:
        """The same signals with some of the output directions only."""
        changes: dict[str, Any] = {"derivatives": self.derivatives[:, start:stop]}
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def cotangent(self, index: int) -> Array:
        """D of one output direction, without its axis S."""
        return self.derivatives[:, index]

    def augmented_inputs(self) -> Array:
        """a with the column of the bias last, shape (N, ..., fan_in)."""
        if self.bias_scale is None:
            return self.inputs
        column = jnp.full((*self.inputs.shape[:-1], 1), self.bias_scale, self.inputs.dtype)
        return jnp.concatenate([self.inputs, column], axis=-1)


def named_updates(
    layers: Sequence[LayerSignals], updates: Sequence[LayerUpdate]
) -> dict[tuple[str | int, ...], dict[str, Array]]:
    """Updates of layers by the paths of the modules and the names of their parameters."""
    named: dict[tuple[str | int, ...], dict[str, Any]] = {}
    leads: dict[tuple[str | int, ...], tuple[int, ...]] = {}
    for layer, update in zip(layers, updates, strict=True):
        own = named.setdefault(layer.path, {})
        parts = layer.parts()
        leads |= {(*layer.path, form.name): form.lead for form in layer.forms}
        for name, leaf in layer.parameters(update).items():
            part = parts.get(name)
            if part is None:
                own[name] = leaf
            elif isinstance(part, int):
                own.setdefault(name, {})[part] = leaf[None]
            else:
                own.setdefault(name, {})[part[0]] = leaf

    def whole(path: tuple[str | int, ...], leaf: Any) -> Array:
        if type(leaf) is dict:
            leaf = jnp.concatenate([leaf[part] for part in sorted(leaf)])
        lead = leads.get(path, ())
        return leaf.reshape(*lead, *leaf.shape[1:]) if lead else leaf

    return {
        path: {name: whole((*path, name), leaf) for name, leaf in own.items()}
        for path, own in named.items()
    }


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


def ravel(updates: Sequence[LayerUpdate]) -> Array:
    """One vector (P,) in the column order of ``dense_jacobian``."""
    return jnp.concatenate(
        [
            jnp.ravel(update[key])
            for update in updates
            for key in ("kernel", "bias")
            if key in update
        ]
    )


def unravel(layers: Sequence[LayerSignals], vector: Array) -> tuple[LayerUpdate, ...]:
    """The inverse of ``ravel``: a vector (P,) as one update a layer."""
    updates, first = [], 0
    for layer in layers:
        updates.append(layer.unravel(vector[first : first + layer.num_params]))
        first += layer.num_params
    return tuple(updates)


def dense_jacobian(layers: Sequence[LayerSignals]) -> Array:
    """J of some layers together, shape (N S, P), layer after layer."""
    return jnp.concatenate([layer.to_dense() for layer in layers], axis=1)
