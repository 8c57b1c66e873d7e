"""Settings that Shampoo and SOAP share, and what stands behind either in a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax import Array, lax

from natgrad_flax.arguments.scalars import check_learning_rate, check_number
from natgrad_flax.transformations.blocks import Group


def check_decay(name: str, value: object) -> float:
    """The weight of the past in a moving average.

    Raises:
      ValueError: not a number of at least 0 and below 1.
    """
    found = check_number(name, value, positive=False)
    if found >= 1:
        raise ValueError(f"{name} must be below 1, got {found!r}")
    return found


def descent(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    momentum: float = 0.0,
) -> optax.GradientTransformation:
    """A descent along a preconditioned gradient: momentum, then decoupled weight decay, then rate.

    Raises:
      ValueError: a number is out of range.
    """
    rate = check_learning_rate(learning_rate, schedule=True)
    parts = [direction]
    if check_decay("momentum", momentum):
        parts.append(optax.trace(momentum))
    if check_number("weight_decay", weight_decay, positive=False):
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def due(steps: Array, every: int, fresh: Callable[[], Any], kept: Any) -> Any:
    """What a function gives at each multiple of an interval, and what is kept at other steps."""
    if every == 1:
        return fresh()
    return lax.cond(steps % every == 0, fresh, lambda: kept)


def tensors(groups: Sequence[Group], blocks: Sequence[Array]) -> list[Array]:
    """The tensors of all groups of blocks, in the order of the leaves of their tree."""
    found: dict[int, Array] = {}
    for group, moved in zip(groups, blocks, strict=True):
        found.update(group.scatter(moved))
    return [found[place] for place in sorted(found)]


def as_tree(tree: Any, found: Sequence[Array]) -> Any:
    """Tensors in the order of the leaves of a tree, with the dtypes of these."""
    leaves, structure = jax.tree.flatten(tree)
    cast = [new.astype(leaf.dtype) for new, leaf in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(structure, cast)
