"""What every operator answers, and operators that act on each layer by itself."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import per_layer
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, unravel
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Gradient, ParameterGradient

Space = Literal["auto", "sample", "parameter"]


def check_space(space: str) -> None:
    """Raises ValueError on an unknown space to solve in."""
    if space not in get_args(Space):
        raise ValueError(f"space must be one of {', '.join(get_args(Space))}, got {space!r}")


def in_parameters(space: Space, rows: int, params: float) -> bool:
    """Whether a system is solved as (params, params) and not as (rows, rows).

    One of infinitely many parameters (of a layer at infinite width) never is.
    """
    if space == "auto" or params == math.inf:
        return params < rows
    return space == "parameter"


class Operator(abc.ABC):
    """A symmetric matrix F on the parameters of some layers, one update a layer as its vectors.

    A damping rho is added to F as rho I, unless the operator says otherwise; the number 0 stands
    for the pseudo-inverse.
    """

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """P."""

    @abc.abstractmethod
    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """(F + rho)^{-1} g, one entry a layer, without the P x P matrix."""

    @abc.abstractmethod
    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """F u, without the P x P matrix."""

    @abc.abstractmethod
    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """F_ii, in the shapes of the parameters."""

    @abc.abstractmethod
    def trace(self) -> Array:
        """The sum of the diagonal, shape ()."""

    @abc.abstractmethod
    def eigenvalues(self) -> Array:
        """Those that may be other than zero, in no particular order; the others are zero."""

    @abc.abstractmethod
    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """A draw from N(0, F + rho), for a definite one."""

    def sample_inverse(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """A draw from N(0, (F + rho)^{-1})."""
        return self.solve(ParameterGradient(self.sample(key, damping)), damping)

    def logdet(self, damping: Array | float) -> Array:
        """log det(F + rho), shape (); NaN or -inf where it is not positive definite."""
        return log_determinant(self.eigenvalues(), self.num_params, damping)

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """The smallest and the largest eigenvalue of F + rho."""
        return extreme_eigenvalues(self.eigenvalues(), self.num_params, damping)

    @abc.abstractmethod
    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """F + rho, shape (P, P), parameters in the order of ``Signals.to_dense``."""


@dataclass(frozen=True)
class OfRows(Operator):
    """An operator made of the rows of J of some layers.

    Attributes:
      layers: the signals, N samples and S output directions each.
      space: "sample" for systems as large as the rows, "parameter" for (P, P), "auto" for the
        smaller.
    """

    layers: tuple[LayerSignals, ...]
    space: Space = "auto"

    @property
    def num_samples(self) -> int:
        """N."""
        return self.layers[0].num_samples

    @property
    def num_rows(self) -> int:
        """N S."""
        return self.num_samples * self.layers[0].num_directions

    @property
    def num_params(self) -> int:
        """P."""
        return sum(layer.num_params for layer in self.layers)

    @property
    def in_parameters(self) -> bool:
        """Whether systems are (P, P)."""
        return in_parameters(self.space, self.num_rows, self.num_params)

    @property
    def side(self) -> int:
        """Of the systems that are solved."""
        return self.num_params if self.in_parameters else self.num_rows


@dataclass(frozen=True)
class OfLayer(Operator):
    """An operator on the parameters of one layer.

    Attributes:
      layer: the signals.
    """

    layer: Any

    @property
    def num_params(self) -> int:
        """P of the layer."""
        count: int = self.layer.num_params
        return count


@dataclass(frozen=True)
class Blocks(Operator):
    """A block of its own for every layer, each of which may have a damping of its own.

    Attributes:
      blocks: one operator a layer.
    """

    blocks: tuple[Operator, ...]

    @property
    def num_params(self) -> int:
        """P."""
        return sum(block.num_params for block in self.blocks)

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``; the damping may be an array with an entry for each layer."""
        rhos = per_layer(damping, len(self.blocks))
        return _joined(
            block.solve(gradient.of_layer(index), rho)
            for index, (block, rho) in enumerate(zip(self.blocks, rhos, strict=True))
        )

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        pairs = zip(self.blocks, vector, strict=True)
        return _joined(block.matvec((part,)) for block, part in pairs)

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""
        return _joined(block.diagonal() for block in self.blocks)

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        return jnp.sum(jnp.stack([block.trace() for block in self.blocks]))

    def eigenvalues(self) -> Array:
        """See ``Operator.eigenvalues``."""
        return jnp.concatenate([block.eigenvalues() for block in self.blocks])

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.sample``."""
        keys, rhos = jax.random.split(key, len(self.blocks)), per_layer(damping, len(self.blocks))
        return _joined(map(lambda b, k, rho: b.sample(k, rho), self.blocks, keys, rhos))

    def logdet(self, damping: Array | float) -> Array:
        """See ``Operator.logdet``."""
        rhos = per_layer(damping, len(self.blocks))
        parts = [block.logdet(rho) for block, rho in zip(self.blocks, rhos, strict=True)]
        return jnp.sum(jnp.stack(parts))

    def extremes(self, damping: Array | float) -> tuple[Array, Array]:
        """See ``Operator.extremes``."""
        rhos = per_layer(damping, len(self.blocks))
        pairs = [block.extremes(rho) for block, rho in zip(self.blocks, rhos, strict=True)]
        low, high = (jnp.stack(side) for side in zip(*pairs, strict=True))
        return jnp.min(low), jnp.max(high)

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """See ``Operator.to_dense``."""
        rhos = per_layer(damping, len(self.blocks))
        dense = [block.to_dense(rho) for block, rho in zip(self.blocks, rhos, strict=True)]
        return jax.scipy.linalg.block_diag(*dense)


def _joined(parts: object) -> tuple[LayerUpdate, ...]:
    return tuple(update for part in parts for update in part)  # type: ignore[attr-defined]


def log_determinant(values: Array, size: int, damping: Array | float) -> Array:
    """log det(F + rho) of F with these eigenvalues, and zeros besides up to a size."""
    rest = size - len(values)
    total = jnp.sum(jnp.log(values + damping))
    return total + rest * jnp.log(damping) if rest > 0 else total


def extreme_eigenvalues(values: Array, size: int, damping: Array | float) -> tuple[Array, Array]:
    """The smallest and the largest eigenvalue of F + rho; the arguments as above."""
    if len(values) < size:
        values = jnp.append(values, 0)
    return jnp.min(values) + damping, jnp.max(values) + damping


def noise(
    key: Array, layers: Sequence[LayerSignals], damping: Array | float
) -> tuple[LayerUpdate, ...]:
    """A draw from N(0, rho I), one entry a layer."""
    params = sum(layer.num_params for layer in layers)
    dtype = jnp.result_type(*jax.tree.leaves(layers[0]))
    draw = jax.random.normal(key, (params,), dtype)
    return unravel(layers, jnp.sqrt(jnp.asarray(damping, dtype)) * draw)


def add(left: Sequence[LayerUpdate], right: Sequence[LayerUpdate]) -> tuple[LayerUpdate, ...]:
    """The sum of two vectors of parameters."""
    return jax.tree.map(jnp.add, tuple(left), tuple(right))


def mean_gram_diagonal(signals: Signals) -> Array:
    """For each layer the mean diagonal of K_l over samples whose weight is not 0, over N."""
    means = jnp.stack([jnp.mean(layer.gram_norms()) for layer in signals.layers])
    return means / signals.num_counted
