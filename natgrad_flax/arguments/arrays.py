"""Arrays as callers give them, and trees of arrays whose first axes all count samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

HOST_SIZE = 2**18
"""Entries up to which an array is looked at by NumPy."""


def batch_size(x: Any) -> int:
    """N, the samples of a batch."""
    return int(np.shape(jax.tree.leaves(x)[0])[0])


def shapes_of(x: Any, *, skip: int = 0) -> Any:
    """Shapes and dtypes of the arrays of a tree, without their first ``skip`` axes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[skip:], leaf.dtype), x)


def described(x: Any) -> str:
    """Dtypes and shapes of a tree in words."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype} {tuple(leaf.shape)}", x))


def is_concrete(array: object) -> bool:
    """Whether the values of an array can be looked at."""
    return not isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct)


def solve_dtype(*dtypes: Any) -> Any:
    """In which precision systems are solved: float32, or float64 where one of the dtypes is."""
    return jnp.float64 if max(jnp.finfo(dtype).bits for dtype in dtypes) > 32 else jnp.float32


@contextmanager
def own_promotion() -> Iterator[None]:
    """Where ``jax_numpy_dtype_promotion`` and ``jax_numpy_rank_promotion`` are JAX's defaults.

    A caller sets them stricter for code of his own.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def check_real(array: Any, name: str) -> None:
    """Raises TypeError on complex numbers: their imaginary parts would be lost."""
    if jnp.issubdtype(array.dtype, np.complexfloating):
        raise TypeError(
            f"{name} has dtype {array.dtype}, but only real numbers are served here: give real and "
            "imaginary parts side by side"
        )


def real_array(value: Any, name: str) -> NDArray[np.float64]:
    """Numbers in float64 for NumPy.

    Raises:
      TypeError: no numbers, or complex ones.
    """
    array = np.asarray(value)
    check_real(array, name)
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {value!r:.60}") from None


def check_concrete(tree: Any, name: str) -> None:
    """Raises TypeError on arrays whose values nobody knows: traced ones, and shapes alone."""
    if not all(map(is_concrete, jax.tree.leaves(tree))):
        raise TypeError(
            f"{name} must be known numbers: this is computed outside of jax.jit, grad, vmap and "
            "eval_shape; call it outside of them, with concrete arrays"
        )


def as_array(value: Any, name: str) -> Array:
    """What a caller gave for an array, as one of JAX.

    Raises:
      TypeError: it is none, or holds something other than numbers.
      ValueError: integers that are too large for those of JAX.
    """
    if isinstance(value, np.ndarray):
        # JAX takes the byte order of this machine alone
        value = value.astype(value.dtype.newbyteorder("="), copy=False)
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        kind = type(value).__name__
        raise TypeError(f"{name} must be an array of numbers, got {kind} {value!r:.60}") from None
    narrowed = isinstance(value, np.ndarray) and value.dtype.kind in "iu"
    if narrowed and array.dtype != value.dtype and (np.asarray(array) != value).any():
        raise ValueError(
            f"{name} has integers that {array.dtype} cannot hold: number them from 0, or switch on "
            "jax_enable_x64"
        )
    return array


def check_finite(array: Any, name: str) -> None:
    """Raises ValueError on a concrete array with NaN or infinite entries."""
    if not is_concrete(array) or not jnp.issubdtype(array.dtype, jnp.inexact):
        return
    # small arrays without a compilation for every shape
    xp: Any = np if array.size <= HOST_SIZE else jnp
    values = np.asarray(array) if xp is np else array
    # a sum is finite where all entries are, in one pass without a temporary; only overflow of the
    # sum itself needs the second look
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
        if np.isfinite(xp.sum(values)):
            return
        bad = int(array.size - xp.sum(xp.isfinite(values)))
    if bad:
        raise ValueError(f"{name} has {bad} NaN or infinite entries of {array.size}")
