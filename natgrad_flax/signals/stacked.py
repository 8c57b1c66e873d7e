"""Signals of the layers that one set of stacked parameters holds: those of the steps of a loop.

Whatever is done to such layers one by one is one program, which a loop runs through its steps, so
that programs do not grow with the number of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.signals.base import LayerSignals, LayerUpdate, ParameterForm
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Residual
from natgrad_flax.signals.shared import ExplicitSignals

Stacking = Literal["none", "inner", "all", "whole"]
"""Which layers may stay together that one set of stacked parameters holds: none; all but the first
and the last affine layer of the model; all, to be solved one by one; or all as the whole that they
are."""


@partial(jax.tree_util.register_dataclass, data_fields=["layer"], meta_fields=["places", "part"])
@dataclass(frozen=True)
class StackedSignals(LayerSignals):
    """Signals of n layers that differ in nothing but their values.

    Together they are a block of parameters; updates, (n, K, M) and (n, M), and the parameters
    themselves have a first axis of layers, cotangents (N, n, ...) a second one.

    Attributes:
      layer: of one of them, with a second axis of n in every array.
      places: of each among all layers; they rise, or fall where the loop starts with the last.
      part: from which step of the parameters to which, not included; None where it is all.
    """

    layer: LayerSignals
    places: tuple[int, ...]
    part: tuple[int, int] | None = None

    @property
    def steps(self) -> int:
        """The number n of layers."""
        return len(self.places)

    @property
    def path(self) -> tuple[str | int, ...]:  # type: ignore[override]
        """Where they stand in the model."""
        return self.layer.path

    @property
    def bias_scale(self) -> float | None:  # type: ignore[override]
        """The factor in front of their biases."""
        return self.layer.bias_scale

    @property
    def kernel_form(self) -> ParameterForm | None:  # type: ignore[override]
        """Layout of the kernel of one."""
        return self.layer.kernel_form

    @property
    def bias_form(self) -> ParameterForm | None:  # type: ignore[override]
        """Layout of the bias of one."""
        return self.layer.bias_form

    @property
    def _one(self) -> LayerSignals:
        """The shapes of one layer."""

        def one(layer: LayerSignals) -> LayerSignals:
            found: LayerSignals = jax.tree.map(lambda leaf: leaf[:, 0], layer)
            return found

        return jax.eval_shape(one, self.layer)

    @property
    def num_samples(self) -> int:
        """N."""
        return self.layer.num_samples

    @property
    def num_directions(self) -> int:
        """S, the number of output directions a sample."""
        return self._one.num_directions

    @property
    def num_units(self) -> int:
        """M of one layer."""
        return self._one.num_units

    @property
    def fan_in(self) -> int:
        """Parameters a unit, of all layers together."""
        return self.steps * self._one.fan_in

    def at(self, step: int) -> LayerSignals:
        """One of the layers, as a part of the parameters."""
        layer: LayerSignals = jax.tree.map(lambda leaf: leaf[:, step], self.layer)
        forms = {
            name: form._replace(part=step)
            for name in ("kernel_form", "bias_form")
            if (form := getattr(layer, name))
        }
        return dataclasses.replace(layer, **forms)  # type: ignore[type-var]

    def between(self, start: int, stop: int) -> StackedSignals:
        """Some of the layers that follow each other."""
        layer = jax.tree.map(lambda leaf: leaf[:, start:stop], self.layer)
        whole = stop - start == self.steps
        return StackedSignals(layer, self.places[start:stop], None if whole else (start, stop))

    def each(self, function: Callable[[LayerSignals], LayerSignals]) -> StackedSignals:
        """See ``LayerSignals.each``."""
        return dataclasses.replace(self, layer=jax.vmap(function, 1, 1)(self.layer))

    def take_directions(self, start: int, stop: int) -> StackedSignals:
        """The same signals with some of the output directions only."""
        return self.each(lambda layer: layer.take_directions(start, stop))

    def mix_directions(self, factor: Array) -> StackedSignals:
        """See ``LayerSignals.mix_directions``."""
        return self.each(lambda layer: layer.mix_directions(factor))

    def cotangent(self, index: int) -> Array:
        """The cotangent of one output direction."""
        return jax.vmap(lambda layer: layer.cotangent(index), 1, 1)(self.layer)

    def _map(self, function: Callable[..., Any], *others: Any) -> Any:
        """A function of one layer and of what is its own of others, layers first."""
        return jax.vmap(function)(steps_first(self.layer), *others)

    def _sum(self, function: Callable[..., Array], *others: Any) -> Array:
        """The sum over layers, of which only one is at work at a time."""
        own = (steps_first(self.layer), *others)
        like = jax.eval_shape(lambda own: jax.vmap(function)(*own), own)

        def add(total: Array, one: Any) -> tuple[Array, None]:
            return total + function(*one), None

        return jax.lax.scan(add, jnp.zeros(like.shape[1:], like.dtype), own)[0]

    def gram(self, other: Any = None) -> Array:
        """The sum of the Gram matrices."""
        others = () if other is None else (steps_first(other.layer),)
        return self._sum(lambda layer, *others: layer.gram(*others), *others)

    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S)."""
        return self._sum(lambda layer: layer.gram_norms())

    def combine(self, coefficients: Array) -> Array:
        """The cotangent of sum_s v[n,s] f[n,s] for v of shape (N, S)."""
        return steps_second(self._map(lambda layer: layer.combine(coefficients)))

    def local_vjp(self, cotangents: Array) -> LayerUpdate:
        """From a cotangent to the parameters, summed over samples."""
        own = steps_first(cotangents)
        update: LayerUpdate = self._map(lambda layer, own: layer.local_vjp(own), own)
        return update

    def local_jvp(self, update: LayerUpdate) -> Array:
        """The dual of ``local_vjp``."""
        return steps_second(self._map(lambda layer, own: layer.local_jvp(own), update))

    def jvp(self, update: LayerUpdate) -> Array:
        """J applied to a step in the parameters, shape (N, S)."""
        return self._sum(lambda layer, own: layer.jvp(own), update)

    def jacobian(self) -> Array:
        """J as (N, S, fan_in, M): the kernels of all layers, then their biases."""
        rows = jnp.moveaxis(self._map(lambda layer: layer.jacobian()), 0, 2)
        kernels = rows if self.bias_scale is None else rows[:, :, :, :-1]
        kernels = kernels.reshape(*rows.shape[:2], -1, self.num_units)
        if self.bias_scale is None:
            return kernels
        return jnp.concatenate([kernels, rows[:, :, :, -1]], axis=2)

    def squares(self) -> LayerUpdate:
        """sum_n sum_s J^2, entry by entry."""
        squares: LayerUpdate = self._map(lambda layer: layer.squares())
        return squares

    def update(self, matrix: Array) -> LayerUpdate:
        """A matrix (fan_in, M) in the order of ``jacobian`` as kernels and biases."""
        if self.bias_scale is None:
            return {"kernel": matrix.reshape(self.steps, -1, self.num_units)}
        kernels = matrix[: -self.steps].reshape(self.steps, -1, self.num_units)
        return {"kernel": kernels, "bias": matrix[-self.steps :]}

    def parameters(self, update: LayerUpdate) -> dict[str, Array]:
        """An update under the names and in the shapes of the stacked parameters."""
        return jax.vmap(self.layer.parameters)(update)

    def parts(self) -> dict[str, Any]:
        """See ``LayerSignals.parts``."""
        return dict.fromkeys(self.layer.parts(), self.part)

    def from_parameters(self, named: Mapping[Any, Array]) -> LayerUpdate:
        """The inverse of ``parameters``; names that are not theirs are passed by."""
        own = {form.name: form.along_one_axis(named[form.name]) for form in self.forms}
        if self.part is not None:
            own = {name: leaf[slice(*self.part)] for name, leaf in own.items()}
        return jax.vmap(self._one.from_parameters)(own)


def steps_first(tree: Any) -> Any:
    """Arrays (N, n, ...) as (n, N, ...)."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tree)


def steps_second(tree: Any) -> Any:
    """The inverse of ``steps_first``."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), tree)


def places_of(layers: Sequence[LayerSignals]) -> list[tuple[int, ...]]:
    """The places of every entry among all layers."""
    stacked = {p for layer in layers if isinstance(layer, StackedSignals) for p in layer.places}
    count = len(stacked) + sum(not isinstance(layer, StackedSignals) for layer in layers)
    rest = (place for place in range(count) if place not in stacked)
    return [
        layer.places if isinstance(layer, StackedSignals) else (next(rest),) for layer in layers
    ]


def arranged(
    signals: Signals, residual: Residual | None, stacking: Stacking
) -> tuple[Signals, Residual | None]:
    """Signals and residual with layers taken out of their stacks.

    Args:
      signals: of a batch.
      residual: of the same batch.
      stacking: which may stay.
    """
    places = places_of(signals.layers)
    ends: set[int] = set()
    if stacking == "inner":
        kinds = [getattr(layer, "layer", layer) for layer in signals.layers]
        affine = [
            max(own)
            for kind, own in zip(kinds, places, strict=True)
            if not isinstance(kind, ExplicitSignals)
        ]
        ends = {0, max(affine, default=0)}
    found: list[tuple[int, LayerSignals, Any]] = []
    cotangents = residual.cotangents if residual is not None else None
    for index, (layer, own) in enumerate(zip(signals.layers, places, strict=True)):
        cotangent = None if cotangents is None else cotangents[index]
        if not isinstance(layer, StackedSignals):
            found.append((own[0], layer, cotangent))
            continue
        kept = [step for step, place in enumerate(own) if stacking != "none" and place not in ends]
        kept = kept if len(kept) > 1 else []
        alone = [step for step in range(layer.steps) if step not in kept]
        for step in alone:
            part = None if cotangent is None else cotangent[:, step]
            found.append((own[step], layer.at(step), part))
        if kept:
            start, stop = kept[0], kept[-1] + 1
            part = None if cotangent is None else cotangent[:, start:stop]
            found.append((own[start], layer.between(start, stop), part))
    found.sort(key=lambda entry: entry[0])
    _, layers, parts = zip(*found, strict=True)
    if cotangents is not None:
        residual = Residual(None, parts)
    return dataclasses.replace(signals, layers=layers), residual
