"""What losses of one head and of several have in common: terms of outputs, and what callers give.

Targets and weights of several heads are tuples in the order of the losses from ``checked_targets``
and ``checked_weights`` on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.losses.base import Loss
from natgrad_flax.losses.heads import Heads
from natgrad_flax.losses.positions import OutputTerms, columns_in_range
from natgrad_flax.losses.targets import (
    check_labels,
    check_targets,
    check_values,
    check_weights,
    fitted,
)

AnyLoss: TypeAlias = Loss | Heads
"""Of one output, or of several."""
LossLike: TypeAlias = AnyLoss | Mapping[str, Loss] | Sequence[Loss]
"""What callers give: losses of several heads may come as they are."""


def each_head(loss: AnyLoss, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """Of every head how its arguments are called, the loss, and its part of tuples by head.

    A plain loss is one head of no name. A tree that is None is that of every head.
    """
    if isinstance(loss, Loss):
        yield ("", loss, *trees)
        return
    for index, (key, one) in enumerate(zip(loss.keys, loss.losses, strict=True)):
        yield (f"[{key!r}]", one, *(None if tree is None else tree[index] for tree in trees))


def by_head(loss: AnyLoss, parts: Sequence[Any]) -> Any:
    """The inverse of ``each_head``: one a head as a tuple; that of a plain loss itself."""
    return parts[0] if isinstance(loss, Loss) else tuple(parts)


@dataclass(frozen=True)
class HeadTerms:
    """``OutputTerms`` of several heads.

    Attributes:
      loss: of all heads, bound to the model.
      terms: of each head alone.
    """

    loss: Heads
    terms: tuple[OutputTerms, ...]

    @property
    def weights(self) -> Array | None:
        """The mean weight over heads, (N, T), or (N, 1) where they have other positions."""
        if all(terms.weights is None for terms in self.terms):
            return None
        found = [
            jnp.ones((len(terms.outputs), terms.num_positions), terms.outputs.dtype)
            if terms.weights is None
            else terms.weights
            for terms in self.terms
        ]
        if len({weights.shape for weights in found}) > 1:
            found = [jnp.mean(weights, axis=1, keepdims=True) for weights in found]
        return sum(found[1:], start=found[0]) / len(found)

    def residual(self) -> Array:
        """c_h (N w / W) r_h side by side, shape (N, C)."""
        parts = zip(self.loss.weights, self.terms, strict=True)
        return self._side_by_side([c * terms.residual()[:, None] for c, terms in parts])[:, 0]

    def directions(self) -> Array:
        """The columns of all R, each zero at the outputs of other heads, shape (N, S, C)."""
        found = [
            c**0.5 * _rows(terms.directions())
            for c, terms in zip(self.loss.weights, self.terms, strict=True)
        ]
        before, whole = 0, sum(part.shape[2] for part in found)
        padded = []
        for part in found:
            after = whole - before - part.shape[2]
            padded.append(jnp.pad(part, ((0, 0), (0, 0), (before, after))))
            before += part.shape[2]
        return jnp.concatenate(padded, axis=1)

    def coefficients(self) -> Array:
        """w with which the directions sum to the residual, shape (N, S)."""
        parts = zip(self.loss.weights, self.terms, strict=True)
        return jnp.concatenate([c**0.5 * terms.coefficients() for c, terms in parts], axis=1)

    def slope(self, vectors: Array) -> Array:
        """The mean over samples of the residual's products with vectors (N, C)."""
        parts = zip(self.loss.weights, self.terms, self.loss.split(vectors), strict=True)
        return sum((c * terms.slope(part) for c, terms, part in parts), start=jnp.zeros(()))

    def curvature(self, left: Array, right: Array) -> Array:
        """The mean over samples of v^T H u for vectors (N, C)."""
        split = self.loss.split
        parts = zip(self.loss.weights, self.terms, split(left), split(right), strict=True)
        return sum((c * terms.curvature(v, u) for c, terms, v, u in parts), start=jnp.zeros(()))

    def drawn(self, key: Array, draws: int, first: Array | int, size: int) -> Array:
        """Residuals of drawn targets, those of all heads in one direction, shape (N, draws, C)."""
        keys = jax.random.split(key, len(self.terms))
        parts = zip(self.loss.weights, self.terms, keys, strict=True)
        return self._side_by_side(
            [c**0.5 * terms.drawn(own, draws, first, size) for c, terms, own in parts]
        )

    def check_curvature(self) -> None:
        """Raises ValueError where H of a head is not positive semi-definite."""
        for terms in self.terms:
            terms.check_curvature()

    @staticmethod
    def _side_by_side(parts: list[Array]) -> Array:
        return jnp.concatenate(list(map(_rows, parts)), axis=2)


def _rows(directions: Array) -> Array:
    """Output directions (N, S, ..., C) with one axis of outputs."""
    return directions.reshape(*directions.shape[:2], -1)


def output_terms(
    loss: AnyLoss, outputs: Array, targets: Any, weights: Any
) -> OutputTerms | HeadTerms:
    """Residual, factor and drawn targets of a loss, of one head or of several.

    Raises:
      ValueError: targets or weights that do not fit the outputs.
    """
    if isinstance(loss, Loss):
        return OutputTerms.of(loss, outputs, targets, weights)
    found = []
    for (name, one, y, w), part in zip(
        each_head(loss, targets, weights), loss.split(outputs), strict=True
    ):
        try:
            found.append(OutputTerms.of(one, part, y, w))
        except ValueError as error:
            raise ValueError(f"head {name[1:-1]}: {error}") from None
    return HeadTerms(loss, tuple(found))


def fitted_to(loss: AnyLoss, targets: Any, outputs: Array) -> Any:
    """Targets in the form and dtype in which the loss takes them beside outputs.

    Raises:
      ValueError: their shape does not fit that of the outputs.
    """
    if isinstance(loss, Loss):
        return fitted(loss, targets, outputs)
    parts = zip(loss.losses, targets, loss.split(outputs), strict=True)
    return tuple(fitted(one, y, part) for one, y, part in parts)


def in_range(loss: AnyLoss, outputs: Array) -> Array | None:
    """Which directions are not zero to rounding, (N, S); None where all are."""
    if isinstance(loss, Loss):
        return columns_in_range(loss, outputs)
    split = loss.split(outputs)
    found = [columns_in_range(one, part) for one, part in zip(loss.losses, split, strict=True)]
    if all(part is None for part in found):
        return None
    counts = [_num_directions(one, part) for one, part in zip(loss.losses, split, strict=True)]
    whole = [
        jnp.ones((len(outputs), count), bool) if part is None else part
        for part, count in zip(found, counts, strict=True)
    ]
    return jnp.concatenate(whole, axis=1)


def _num_directions(loss: Loss, outputs: Array) -> int:
    terms = OutputTerms.of(loss, outputs, None, None)
    return int(jax.eval_shape(terms.directions).shape[1])


def ordered_targets(loss: AnyLoss, value: Any, name: str) -> Any:
    """Targets of several heads as a tuple; of one head, or None, as they are."""
    return loss.ordered(value, name) if isinstance(loss, Heads) and value is not None else value


def ordered_weights(loss: AnyLoss, value: Any, name: str) -> Any:
    """Weights of several heads as a tuple; of one head, or None, as they are."""
    if isinstance(loss, Heads) and value is not None:
        return loss.given_weights(value, name)
    return value


def checked_targets(loss: AnyLoss, value: Any, samples: int, name: str = "y") -> Any:
    """Targets as arrays, by head; see ``targets.check_targets``.

    Raises:
      TypeError, ValueError: as there; targets of other heads.
    """
    given = ordered_targets(loss, value, name)
    return by_head(
        loss,
        [check_targets(one, y, samples, name + own) for own, one, y in each_head(loss, given)],
    )


def checked_weights(loss: AnyLoss, value: Any, samples: int, name: str = "weights") -> Any:
    """Weights as arrays, by head; None for a plain mean. See ``targets.check_weights``.

    Raises:
      TypeError, ValueError: as there; weights of other heads.
    """
    if value is None:
        return None
    given = ordered_weights(loss, value, name)
    return by_head(
        loss,
        [
            None if w is None else check_weights(w, samples, name + own)
            for own, _, w in each_head(loss, given)
        ],
    )


def check_all_values(loss: AnyLoss, targets: Any, weights: Any, name: str = "y") -> None:
    """Looks at concrete targets that count, of every head; see ``targets.check_values``."""
    for own, one, y, w in each_head(loss, targets, weights):
        check_values(one, y, w, name + own)


def check_all_labels(
    loss: AnyLoss, targets: Any, weights: Any, outputs: tuple[int, ...], name: str = "y"
) -> None:
    """Refuses class numbers that are none of the model's; ``outputs`` is the shape of all."""
    shapes = loss.shapes if isinstance(loss, Heads) else (outputs,)
    assert shapes is not None
    for (own, one, y, w), shape in zip(each_head(loss, targets, weights), shapes, strict=True):
        check_labels(one, y, w, shape[-1], name + own)
