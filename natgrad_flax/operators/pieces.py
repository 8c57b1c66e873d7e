"""Fisher blocks of pieces of units: of some inputs of a unit at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import of_block
from natgrad_flax.linalg.dense import add_diagonal, eigh, psd_eigenvalues
from natgrad_flax.operators.dense_units import unit_weights
from natgrad_flax.operators.units import ExactDiagonal, invert_blocks
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals
from natgrad_flax.signals.gradient import Gradient

Pieces = dict[str, Array]
"""Matrices of the pieces of every unit, (M, number, width, width), by the names of ``cut``.

No piece is larger than the fan-in, so "whole" is always there."""


class Cut(NamedTuple):
    """Neighbouring inputs, from a first one on, as ``number`` pieces of ``width`` each."""

    start: int
    number: int
    width: int

    def of(self, array: Array, axis: int) -> Array:
        """These inputs of an array, whose axis of inputs becomes (number, width)."""
        stop = self.start + self.number * self.width
        part = jax.lax.slice_in_dim(array, self.start, stop, axis=axis)
        shape = (*array.shape[:axis], self.number, self.width, *array.shape[axis + 1 :])
        return part.reshape(shape)


def cut(fan_in: int, size: int) -> dict[str, Cut]:
    """The "whole" pieces of a fan-in, and the "rest" where it does not divide."""
    number, rest = divmod(fan_in, size)
    found = {"whole": Cut(0, number, size), "rest": Cut(number * size, 1, rest)}
    return {name: piece for name, piece in found.items() if piece.number * piece.width}


def piece_blocks(layer: LayerSignals, size: int) -> Pieces:
    """J_p^T J_p / N of every piece p of every unit.

    Args:
      layer: signals of any kind.
      size: inputs a piece.
    """
    found, n = {}, layer.num_samples
    for name, piece in cut(layer.fan_in, size).items():
        if isinstance(layer, DenseSignals):
            inputs = piece.of(layer.augmented_inputs(), 1)
            products = inputs[:, :, :, None] * inputs[:, :, None, :]
            blocks = jnp.einsum("nm,npkj->mpkj", unit_weights(layer) / n, products)
        else:
            jacobian = piece.of(layer.jacobian(), 2)
            blocks = jnp.einsum("nspkm,nspjm->mpkj", jacobian, jacobian) / n
        found[name] = blocks
    return found


def invert_pieces(pieces: Pieces, damping: Array | float) -> Pieces:
    """(block + rho)^{-1} of every piece; the pseudo-inverse at the number 0."""
    return {
        name: invert_blocks(flat(blocks), of_block(damping)).reshape(blocks.shape)
        for name, blocks in pieces.items()
    }


def multiply_pieces(pieces: Pieces, matrix: Array) -> Array:
    """The matrices of all pieces times g, (fan_in, M)."""
    return _over_pieces(
        pieces, matrix, lambda blocks, part: jnp.einsum("mpkj,pjm->pkm", blocks, part)
    )


def flat(blocks: Array) -> Array:
    """(M, number, width, width) as (M number, width, width)."""
    return blocks.reshape(-1, *blocks.shape[2:])


def _over_pieces(pieces: Pieces, matrix: Array, function: Callable[[Array, Array], Array]) -> Array:
    """A function of matrices and of (number, width, M), put together to (fan_in, M)."""
    fan_in, units = matrix.shape
    cuts = cut(fan_in, pieces["whole"].shape[-1])
    return jnp.concatenate(
        [
            function(pieces[name], piece.of(matrix, 0)).reshape(-1, units)
            for name, piece in cuts.items()
        ]
    )


@dataclass(frozen=True)
class UnitPieces(ExactDiagonal):
    """Blocks of the pieces of all units of a layer.

    Attributes:
      layer: signals of any kind.
      pieces: the blocks.
    """

    layer: LayerSignals
    pieces: Pieces

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``."""
        (g,) = gradient.vector((self.layer,))
        return self._times(invert_pieces(self.pieces, damping), g)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        return self._times(self.pieces, vector[0])

    def _times(self, pieces: Pieces, vector: LayerUpdate) -> tuple[LayerUpdate, ...]:
        return (self.layer.update(multiply_pieces(pieces, matrix_of(vector))),)

    def eigenvalues(self) -> Array:
        """Of all pieces, one after the other."""
        return jnp.concatenate(
            [
                jax.lax.map(psd_eigenvalues, flat(blocks)).reshape(-1)
                for blocks in self.pieces.values()
            ]
        )

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """(block + rho)^(1/2) z of every piece, with z standard normal."""
        shape = (self.layer.fan_in, self.layer.num_units)
        draw = jax.random.normal(key, shape, self.pieces["whole"].dtype)

        def root(block: Array) -> Array:
            values, vectors = eigh(block)
            return vectors * jnp.sqrt(jnp.maximum(values, 0) + of_block(damping)) @ vectors.T

        roots = {
            name: jax.lax.map(root, flat(blocks)).reshape(blocks.shape)
            for name, blocks in self.pieces.items()
        }
        return (self.layer.update(multiply_pieces(roots, draw)),)

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """J^T J / N between parameters of one piece of one unit, plus rho I."""
        fan_in, units = self.layer.fan_in, self.layer.num_units
        blocks = self.pieces["whole"]
        full = jnp.zeros((fan_in, units, fan_in, units), blocks.dtype)
        every = np.arange(units)[:, None, None, None]
        for name, piece in cut(fan_in, blocks.shape[-1]).items():
            rows = piece.start + np.arange(piece.number * piece.width).reshape(piece[1:])
            full = full.at[rows[:, :, None], every, rows[:, None, :], every].set(self.pieces[name])
        return add_diagonal(full.reshape((fan_in * units,) * 2), of_block(damping))
