"""Where a batch and a model lie: the mesh, its axis of samples, and the checks of both."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Placement:
    """The devices of a computation.

    Attributes:
      mesh: with automatic axes, so that XLA places what no constraint places.
      axis: the axis over which samples are sharded.
    """

    mesh: Mesh
    axis: str

    @property
    def size(self) -> int:
        """The number of parts of a batch."""
        return int(self.mesh.shape[self.axis])

    @property
    def rows(self) -> NamedSharding:
        """Samples sharded, all other axes whole."""
        return NamedSharding(self.mesh, PartitionSpec(self.axis))

    @property
    def whole(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())


def place(mesh: object, axis: object) -> Placement:
    """A mesh and the axis of its samples, checked.

    A mesh with explicit axes (``jax.make_mesh``'s default) is taken with automatic ones.

    Raises:
      TypeError: no mesh.
      ValueError: the mesh has no such axis.
    """
    mesh = automatic_mesh(mesh)
    if axis not in mesh.axis_names:
        near = difflib.get_close_matches(str(axis), [str(name) for name in mesh.axis_names], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        axes = ", ".join(f"{name!r} of size {size}" for name, size in mesh.shape.items())
        raise ValueError(f"the mesh has no axis {axis!r}, only {axes}{hint}")
    return Placement(mesh, str(axis))


def automatic_mesh(mesh: object) -> Mesh:
    """The same devices with automatic axes, so that XLA places what no constraint places.

    Raises:
      TypeError: no mesh.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)


def check_divisible(placement: Placement, num_samples: int) -> None:
    """Raises ValueError unless a batch has a whole number of samples for every part."""
    parts = placement.size
    if num_samples % parts:
        below, above = num_samples // parts * parts, -(-num_samples // parts) * parts
        sizes = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"a batch of {num_samples} samples cannot be dealt out in equal parts over the "
            f"{parts} devices of mesh axis {placement.axis!r}; take {sizes} samples"
        )


def check_automatic(*arrays: Any) -> None:
    """Raises ValueError on traced arrays whose shardings are part of their types."""
    for array in arrays:
        if not isinstance(array, jax.core.Tracer):
            continue
        if AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types:
            raise ValueError(
                "a traced array lies on a mesh with explicit axes, where no formula can leave the "
                "placement to XLA: make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
            )


def shard_batch(mesh: Mesh, *arrays: Any, axis: str = "data") -> tuple[Any, ...]:
    """Puts the arrays of a batch onto a mesh, samples sharded over one axis.

    Args:
      mesh: the devices.
      *arrays: with samples along their first axis, or trees of such arrays. On one process the
        whole batch; on several each process gives its own part, and all parts have the same size.
      axis: the mesh axis of the samples.

    Raises:
      TypeError, ValueError: no mesh, no such axis, or a number of samples that cannot be dealt
        out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from natgrad_flax.devices import shard_batch
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> x, y = shard_batch(mesh, jnp.eye(4), jnp.ones((4, 1)))
      >>> x.shape, x.sharding.spec[0]
      ((4, 4), 'data')
    """
    placement = place(mesh, axis)
    return tuple(jax.tree.map(partial(_deal_out, placement), array) for array in arrays)


def _deal_out(placement: Placement, array: Any) -> Array:
    if np.ndim(array) == 0:
        raise ValueError("an array of a batch needs an axis of samples, got a scalar")
    check_divisible(placement, np.shape(array)[0] * jax.process_count())
    if jax.process_count() == 1:
        return jax.device_put(array, placement.rows)
    return jax.make_array_from_process_local_data(placement.rows, np.asarray(array))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts a copy of every array of a pytree onto every device of a mesh.

    Args:
      mesh: the devices.
      tree: for example ``nnx.state(model)``. Several processes must all give the same values, as
        they do where the same seed made them.

    Raises:
      TypeError: no mesh.
      ValueError: the processes gave different values.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from natgrad_flax.devices import replicate
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> nnx.update(model, replicate(mesh, nnx.state(model)))
      >>> model.kernel[...].sharding.is_fully_replicated
      True
    """
    sharding = NamedSharding(automatic_mesh(mesh), PartitionSpec())
    if jax.process_count() > 1:
        host = [np.asarray(_numbers(leaf)) for leaf in jax.tree.leaves(tree)]
        try:
            multihost_utils.assert_equal(host)
        except AssertionError:
            raise ValueError(
                "the processes gave different values to copy to all devices: make them from the "
                "same seed everywhere"
            ) from None
    return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    """An array on a mesh that may have devices of other processes, which have the same array."""
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    host = np.asarray(_numbers(leaf))
    placed = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return (
        jax.random.wrap_key_data(placed, impl=jax.random.key_impl(leaf))
        if _is_key(leaf)
        else placed
    )


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def on_mesh(placement: Placement, tree: Any, default: NamedSharding) -> Any:
    """Concrete arrays of a pytree on the mesh: those that lie on its devices stay as they are."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        found = getattr(leaf, "sharding", None)
        if isinstance(found, NamedSharding) and _same_devices(found.mesh, placement.mesh):
            return jax.device_put(leaf, NamedSharding(placement.mesh, found.spec))
        return _put(leaf, default)

    return jax.tree.map(move, tree)


def _same_devices(left: Any, right: Mesh) -> bool:
    return left.axis_names == right.axis_names and np.array_equal(left.devices, right.devices)


def local_model(model: nnx.Module) -> nnx.Module:
    """The model with what this process can see of its parameters."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(local_part, state))


def local_part(array: Any) -> Any:
    """What this process can see of an array: all of it, or its own samples."""
    if not isinstance(array, Array) or isinstance(array, jax.core.Tracer):
        return array
    if array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    parts = {_start(shard.index): shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)


def device_memory() -> int:
    """Bytes that one device of this process could hold."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.floor(machine / jax.local_device_count())
