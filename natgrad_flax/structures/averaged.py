"""Structures that are functions of means over samples, so that the means may run over batches."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array

from natgrad_flax.signals.base import LayerUpdate, ravel
from natgrad_flax.signals.dense import Signals
from natgrad_flax.structures.base import Structure


class Moments(NamedTuple):
    """What a structure knows of the Fisher: means over samples, and a basis made of them.

    Attributes:
      factors: means over samples, one entry a layer.
      basis: made of the factors, one entry a layer; () where a structure has none.
      rotated: means over samples of what the signals are in this basis; () without.
    """

    factors: Any
    basis: Any = ()
    rotated: Any = ()


class AveragedStructure(Structure):
    """A Fisher approximation that is known by means over samples.

    ``statistics`` and ``rotated`` are means with equal weights: those of a batch are the mean of
    those of its equal parts. The shapes of all that is returned here depend on the network alone,
    not on the number of samples or output directions.
    """

    cheap_inverse: ClassVar[bool] = False
    """Whether ``invert`` costs less than the statistics, so that it is renewed with them."""

    has_basis: ClassVar[bool] = False
    """Whether ``basis`` and ``rotated`` are anything."""

    @abc.abstractmethod
    def statistics(self, signals: Signals) -> tuple[Any, ...]:
        """Means over samples, one entry a layer."""

    def latest(self, signals: Signals) -> tuple[Any, ...]:
        """Statistics of one batch that will be averaged with no other.

        They may have another form than ``statistics``, whose shapes depend on N, too.
        """
        return self.statistics(signals)

    def basis(self, factors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The basis that these statistics give."""
        return ()

    def rotated(self, signals: Signals, basis: tuple[Any, ...]) -> tuple[Any, ...]:
        """Means over samples of the signals in a basis."""
        return ()

    @abc.abstractmethod
    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[Any, ...]:
        """What ``apply`` needs of G^{-1}, one entry a layer.

        Args:
          moments: of a batch, or averaged over batches.
          damping: as in ``solve``.
          num_samples: N of a batch, on which scalings of the theory depend; without samples of
            weight 0, and so an array, where it has weights.
        """

    @abc.abstractmethod
    def apply(
        self, inverse: tuple[Any, ...], gradient: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g, one entry a layer."""

    def basis_of(self, inverse: tuple[Any, ...]) -> tuple[Any, ...]:
        """The basis that is part of an inverse, so that it need not be kept twice."""
        return ()

    @abc.abstractmethod
    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """``damping_scale`` from moments."""

    def moments(self, signals: Signals) -> Moments:
        """All means of one batch, and the basis that they give."""
        factors = self.statistics(signals)
        basis = self.basis(factors)
        return Moments(factors, basis, self.rotated(signals, basis))

    def damping_scale(self, signals: Signals) -> Array:
        """See ``Structure.damping_scale``."""
        return self.scale_of(self.moments(signals), signals.num_counted)

    def factor_size(self, signals: Signals) -> int:
        """The side of the largest square array among the statistics."""
        shapes = jax.tree.leaves(jax.eval_shape(self.statistics, signals))
        return max((leaf.shape[-1] for leaf in shapes if leaf.ndim == 3), default=0)


def coefficient_by_inverse(
    structure: AveragedStructure, test: Signals, train: Signals, damping: Array | float
) -> Array:
    """``Structure.coefficient`` by one inverse, which is applied to the rows of J."""
    inverse = structure.invert(structure.moments(train), damping, train.num_counted)

    def column(row: Array) -> Array:
        return ravel(structure.apply(inverse, train.unravel(row)))

    columns = jax.lax.map(column, train.to_dense())
    return test.to_dense() @ columns.T / train.num_samples


def update_like(gradient: LayerUpdate, matrix: Array) -> LayerUpdate:
    """A matrix (fan_in, M) as kernel and, where the gradient has one, bias."""
    if "bias" not in gradient:
        return {"kernel": matrix}
    return {"kernel": matrix[:-1], "bias": matrix[-1]}
