"""Arrays as a checkpoint holds them: what orbax takes, and what tells that they are the same."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def kind(leaf: Any) -> str:
    """Type and shape of an array in words."""
    name = jax.random.key_impl(leaf) if _is_key(leaf) else plain(leaf).dtype
    return f"{name}{list(leaf.shape)}"


def plain(leaf: Any) -> Any:
    """A leaf as orbax takes it: keys as numbers, those of one process from the host."""
    numbers = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if isinstance(numbers, np.ndarray):
        # orbax writes another byte order, too, and reads the machine's
        return numbers.astype(numbers.dtype.newbyteorder("="), copy=False)
    if jax.process_count() > 1 and numbers.is_fully_addressable:
        return np.asarray(numbers)
    return numbers


def template(leaf: Any) -> Any:
    """What tells orbax how to read a leaf, and where to put it."""
    numbers = plain(leaf)
    if isinstance(numbers, np.ndarray):
        return numbers
    return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=numbers.sharding)


def typed(numbers: Any, leaf: Any) -> Any:
    """What was read, in the form and at the place of a leaf."""
    if isinstance(leaf, np.ndarray):
        return np.asarray(numbers)
    if _is_key(leaf):
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))
    return jax.device_put(numbers, leaf.sharding) if isinstance(numbers, np.ndarray) else numbers


def digest(leaf: Any) -> str:
    """SHA-256 of the values of an array, whatever devices and processes hold it."""
    numbers = plain(leaf)
    if isinstance(numbers, Array) and not numbers.is_fully_addressable:
        # each process has all of it, or the others' parts have to be fetched
        numbers = (
            numbers.addressable_data(0)
            if numbers.is_fully_replicated
            else multihost_utils.process_allgather(numbers, tiled=True)
        )
    return hashlib.sha256(np.asarray(numbers).tobytes()).hexdigest()
