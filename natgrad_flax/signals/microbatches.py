"""A batch in microbatches, one after the other: the activations of only one are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_flax.arguments.arrays import batch_size

Run = Callable[..., tuple[Any, Any]]
"""From the number of the first sample of a microbatch, and its arrays, to means over its samples
and to arrays whose first axis counts them."""
Passes = Callable[[Run, tuple[Any, ...], int], tuple[Any, Any]]
"""``in_microbatches``, or what gives the same on several devices."""


def in_microbatches(run: Run, arrays: tuple[Any, ...], microbatches: int) -> tuple[Any, Any]:
    """What ``run`` gives for a whole batch.

    Args:
      run: of one microbatch.
      arrays: of the batch, or trees of them; the first axis counts N samples.
      microbatches: how many, a divisor of N.

    Returns:
      The means over all samples, and the arrays with all of them in order.
    """
    if microbatches == 1:
        return run(0, *arrays)
    size = batch_size(arrays) // microbatches
    split = jax.tree.map(lambda array: array.reshape(microbatches, size, *array.shape[1:]), arrays)
    firsts = size * jnp.arange(microbatches)
    shapes, _ = jax.eval_shape(run, firsts[0], *jax.tree.map(lambda array: array[0], split))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: Any, microbatch: tuple[Any, ...]) -> tuple[Any, Any]:
        means, rows = run(*microbatch)
        return jax.tree.map(lambda a, b: a + b / microbatches, total, means), rows

    means, rows = jax.lax.scan(add, start, (firsts, *split))
    return means, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
