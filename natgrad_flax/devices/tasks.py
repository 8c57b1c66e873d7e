"""Small tasks dealt out to devices: each is done by one of them, and all get the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec


@dataclass(frozen=True)
class Task:
    """A function of arrays that all devices have.

    Attributes:
      function: from the arguments to a pytree of arrays; without collectives.
      arguments: pytrees of arrays.
      cost: relative to other tasks.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cost: float


def distribute(tasks: Sequence[Task], mesh: Mesh) -> list[Any]:
    """The results of all tasks, on every device.

    Each device branches to its own tasks by its place in the mesh, and a sum over devices, of which
    all but one give zeros, spreads the results. The largest task bounds what this can save.

    Args:
      tasks: what is to be done.
      mesh: with automatic axes; all of its devices take part.
    """
    if not tasks:
        return []
    owners = balance([task.cost for task in tasks], mesh.size)
    busy = max(owners) + 1
    arguments = [task.arguments for task in tasks]
    shapes = [jax.eval_shape(task.function, *task.arguments) for task in tasks]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def branch(device: int) -> Callable[[list[Any]], list[Any]]:
        def run(arguments: list[Any]) -> list[Any]:
            return [
                task.function(*given) if owner == device else nothing
                for task, given, owner, nothing in zip(tasks, arguments, owners, zeros, strict=True)
            ]

        return run

    def local(arguments: list[Any]) -> list[Any]:
        # the last branch is that of devices without a task
        place = jnp.minimum(lax.axis_index(mesh.axis_names), busy)
        found = lax.switch(place, [branch(device) for device in range(busy + 1)], arguments)
        return jax.tree.map(lambda leaf: lax.psum(leaf, mesh.axis_names), found)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(),),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(arguments)


def balance(costs: Sequence[float], devices: int) -> list[int]:
    """The device of every task: the dearest first, each to the device with the least so far."""
    loads, owners = [0.0] * devices, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners
