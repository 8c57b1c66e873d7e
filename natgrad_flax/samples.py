"""Inputs as trees: arrays in dictionaries and tuples, whose first axes all count the samples."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def batch_size(x: Any) -> int:
    """N, the samples of a batch."""
    return int(np.shape(jax.tree.leaves(x)[0])[0])


def shapes_of(x: Any, *, skip: int = 0) -> Any:
    """Shapes and dtypes of the arrays of a tree, without their first ``skip`` axes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[skip:], leaf.dtype), x)


def described(x: Any) -> str:
    """Dtypes and shapes of a tree in words."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype} {tuple(leaf.shape)}", x))
