"""Structures on stacked layers: one program for all steps of a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.signals.base import LayerUpdate
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Gradient, ParameterGradient, Residual
from natgrad_flax.signals.stacked import StackedSignals, Stacking, places_of, steps_first
from natgrad_flax.structures.averaged import Moments
from natgrad_flax.structures.base import Structure


def stacking_of(structure: Structure) -> Stacking:
    """Which layers a structure takes as stacks; none on a mesh, where layers are dealt out."""
    return structure.stacking if structure.plain is structure else "none"


def stacked(structure: Any, signals: Signals) -> Any:
    """A structure for signals of which some are stacked; itself where none is.

    Args:
      structure: the structure.
      signals: of a batch, or their shapes, as its ``stacking`` allows them.
    """
    groups: dict[int, list[int]] = {}
    for entry, layer in enumerate(signals.layers):
        steps = layer.steps if isinstance(layer, StackedSignals) else 0
        groups.setdefault(steps, []).append(entry)
    if set(groups) == {0} or structure.stacking == "whole":
        return structure
    places = places_of(signals.layers)
    return Stacked(
        structure,
        tuple(
            Group(tuple(entries), np.array([places[entry] for entry in entries]).T, steps > 0)
            for steps, entries in groups.items()
        ),
    )


@dataclass(frozen=True)
class Group:
    """Entries of signals that go through one program.

    Attributes:
      entries: their numbers, E of them.
      places: among all layers, (n, E) of stacks of n layers, (1, E) of layers that stand alone.
      is_stacked: whether they are stacks.
    """

    entries: tuple[int, ...]
    places: np.ndarray
    is_stacked: bool


@dataclass(frozen=True)
class Stacked:
    """What ``Structure`` and ``AveragedStructure`` answer, for signals of which some are stacked.

    What it returns of a stack of n layers is what the structure returns of each, in arrays with a
    first axis of n. The layers of a stack run one after the other, as they would alone.

    Attributes:
      structure: one that solves layer by layer; its ``inner`` serves the stacks.
      groups: of all entries.
    """

    structure: Any
    groups: tuple[Group, ...]

    @property
    def has_basis(self) -> bool:
        """See ``AveragedStructure``."""
        return bool(self.structure.has_basis)

    @property
    def cheap_inverse(self) -> bool:
        """See ``AveragedStructure``."""
        return bool(self.structure.cheap_inverse)

    def _over(
        self,
        function: Callable[..., Any],
        *sequences: Sequence[Any],
        damping: Any = 0.0,
        along: Callable[[Callable[[Any], Any], Any], Any] = jax.lax.map,
    ) -> tuple[Any, ...]:
        """What a function gives for every entry.

        Args:
          function: of a structure, of tuples with the layers' own of each sequence, and of their
            damping; it returns one thing a layer.
          sequences: of what the entries have, stacks with layers first.
          damping: a number, or an array of one entry a layer.
          along: runs a function of one layer for all of a stack.
        """
        found: dict[int, Any] = {}
        for group in self.groups:
            own = [tuple(sequence[entry] for entry in group.entries) for sequence in sequences]
            rhos = jnp.asarray(damping)[group.places] if jnp.ndim(damping) else None
            structure = self.structure.inner if group.is_stacked else self.structure

            def run(both: Any, structure: Any = structure) -> tuple[Any, ...]:
                own, rho = both
                return tuple(function(structure, *own, damping if rho is None else rho))

            if group.is_stacked:
                values = along(run, (own, rhos))
            else:
                values = run((own, None if rhos is None else rhos[0]))
            found.update(zip(group.entries, values, strict=True))
        return tuple(found[entry] for entry in range(len(found)))

    def _over_signals(
        self,
        function: Callable[..., Any],
        signals: Signals,
        *sequences: Sequence[Any],
        **named: Any,
    ) -> tuple[Any, ...]:
        """As ``_over``, the first argument but the structure the layers' signals."""

        def of_layers(structure: Structure, layers: Any, *own: Any) -> Any:
            return function(structure, replace(signals, layers=layers), *own)

        layers = [
            steps_first(layer.layer) if isinstance(layer, StackedSignals) else layer
            for layer in signals.layers
        ]
        return self._over(of_layers, layers, *sequences, **named)

    def _in_order(self, values: Sequence[Array]) -> Array:
        """What the entries have of each layer, in the order of the layers."""
        pairs = [
            (values[entry] if group.is_stacked else values[entry][None], places)
            for group in self.groups
            for entry, places in zip(group.entries, group.places.T, strict=True)
        ]
        found, places = zip(*pairs, strict=True)
        return jnp.concatenate(found)[np.argsort(np.concatenate(places))]

    def solve_and_report(
        self, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[tuple[LayerUpdate, ...], Any]:
        """See ``Structure``."""
        parts: Sequence[Any] = [()] * len(signals.layers)
        if isinstance(gradient, ParameterGradient):
            parts = gradient.layers
        elif isinstance(gradient, Residual) and gradient.cotangents is not None:
            parts = [
                steps_first(own) if isinstance(layer, StackedSignals) else own
                for layer, own in zip(signals.layers, gradient.cotangents, strict=True)
            ]

        def solve(structure: Structure, signals: Signals, own: Any, rho: Any) -> Any:
            right = gradient
            if isinstance(gradient, ParameterGradient):
                right = ParameterGradient(own)
            elif gradient.coefficients is None:
                right = Residual(None, own)
            return structure.solve(signals, right, rho)

        return self._over_signals(solve, signals, parts, damping=damping), None

    def damping_scale(self, signals: Signals) -> Array:
        """See ``Structure``; of all layers."""
        return self._in_order(
            self._over_signals(lambda s, signals, _: s.damping_scale(signals), signals)
        )

    def statistics(self, signals: Signals) -> tuple[Any, ...]:
        """See ``AveragedStructure``, as of all that follows."""
        return self._over_signals(lambda s, signals, _: s.statistics(signals), signals)

    def latest(self, signals: Signals) -> tuple[Any, ...]:
        """Statistics that will be averaged with no other."""
        return self._over_signals(lambda s, signals, _: s.latest(signals), signals)

    def basis(self, factors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The basis that statistics give."""
        return self._over(lambda s, factors, _: s.basis(factors), factors)

    def rotated(self, signals: Signals, basis: tuple[Any, ...]) -> tuple[Any, ...]:
        """Means over samples of the signals in a basis."""
        return self._over_signals(
            lambda s, signals, basis, _: s.rotated(signals, basis), signals, basis
        )

    def basis_of(self, inverse: tuple[Any, ...]) -> tuple[Any, ...]:
        """The basis that is part of an inverse."""
        found: tuple[Any, ...] = self.structure.basis_of(inverse)
        return found

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[Any, ...]:
        """What ``apply`` needs of G^{-1}."""

        def invert(structure: Any, *both: Any) -> Any:
            *parts, rho = both
            return structure.invert(Moments(*parts), rho, num_samples)

        return self._over(invert, *filter(None, moments), damping=damping)

    def apply(
        self, inverse: tuple[Any, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; products of the size of the parameters, of all layers at once."""

        def apply(structure: Any, inverse: Any, gradient: Any, _: Any) -> Any:
            return structure.apply(inverse, gradient)

        return self._over(apply, inverse, gradient, along=_at_once)

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """``damping_scale`` from moments."""

        def scale(structure: Any, *both: Any) -> Any:
            return structure.scale_of(Moments(*both[:-1]), num_samples)

        return self._in_order(self._over(scale, *filter(None, moments)))


def _at_once(function: Callable[[Any], Any], stack: Any) -> Any:
    """As ``lax.map``, by operations with an axis more."""
    return jax.vmap(function)(stack)
