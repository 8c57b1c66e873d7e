"""The plain code of structures and operators, run on the devices of a mesh.

It is traced once. Its cubic operations that stand at the top of the program become tasks, each done
by one device; those that need the results of others follow in rounds. Inside of loops and branches
they are left to every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, DropVar, Literal, jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from natgrad_flax.devices.placement import Placement
from natgrad_flax.devices.tasks import Task, distribute
from natgrad_flax.linalg.execution import Executor, executed_by


def run_on_mesh(function: Callable[[], Any], placement: Placement) -> Any:
    """What a function returns, its cubic operations and its columns dealt out.

    Args:
      function: to be traced; what it is made of may be traced arrays.
      placement: the devices.
    """
    executor = OnMesh(placement)
    with executed_by(executor):
        program, shapes = jax.make_jaxpr(function, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shapes), executor.run(program))


@dataclass(frozen=True)
class OnMesh(Executor):
    """Marks what becomes a task, and splits columns at once.

    Attributes:
      placement: the devices.
      tasks: functions of arrays, by the names of the calls that stand for them in the program.
    """

    placement: Placement
    tasks: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    many_devices = True

    def cubic(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """See ``execution.cubic``."""
        leaves, tree = jax.tree.flatten(arrays)
        given = [leaf for leaf in leaves if isinstance(leaf, Array)]
        # numbers stay what they are: at 0 a damping decides the formula
        numbers = [None if isinstance(leaf, Array) else leaf for leaf in leaves]

        def task(*given: Array) -> Any:
            rest = iter(given)
            merged = [next(rest) if number is None else number for number in numbers]
            with executed_by():
                return function(*jax.tree.unflatten(tree, merged))

        task.__name__ = f"natgrad_task_{len(self.tasks)}"
        self.tasks[task.__name__] = task
        return jax.jit(task)(*given)

    def by_columns(
        self, function: Callable[..., Array], split: tuple[Array, ...], whole: tuple[Any, ...]
    ) -> Array:
        """See ``execution.by_columns``; they are filled up with copies of the last one."""
        columns = split[0].shape[-1]
        if columns == 1:
            return function(*split, *whole)

        def spec(ndim: int) -> PartitionSpec:
            return PartitionSpec(*(None,) * (ndim - 1), self.placement.axis)

        filled = tuple(_fill(array, self.placement.size) for array in split)
        found = jax.shard_map(
            executed_by()(function),
            mesh=self.placement.mesh,
            in_specs=(*(spec(array.ndim) for array in split), *(PartitionSpec(),) * len(whole)),
            out_specs=spec(split[-1].ndim),
            check_vma=False,
        )(*filled, *whole)
        return found[..., :columns]

    def by_rows(self, array: Array) -> Array:
        """See ``execution.by_rows``."""
        if array.shape[-2] % self.placement.size:
            return array
        spec = PartitionSpec(*(None,) * (array.ndim - 2), self.placement.axis)
        return lax.with_sharding_constraint(array, NamedSharding(self.placement.mesh, spec))

    def run(self, program: ClosedJaxpr) -> list[Any]:
        """The results of a program: what is ready in place, then all tasks that are, and so on."""
        jaxpr = program.jaxpr
        known = dict(zip(jaxpr.constvars, program.consts, strict=True))
        waiting = jaxpr.eqns
        while waiting:
            plain, marked, later = [], [], []
            made = set(known)
            for eqn in waiting:
                if not all(isinstance(atom, Literal) or atom in made for atom in eqn.invars):
                    later.append(eqn)
                elif eqn.params.get("name") in self.tasks:
                    marked.append(eqn)
                else:
                    plain.append(eqn)
                    made.update(eqn.outvars)
            waiting = later
            outs = [v for eqn in plain for v in eqn.outvars if not isinstance(v, DropVar)]
            part = jaxpr.replace(constvars=[], invars=list(known), outvars=outs, eqns=plain)
            known |= zip(outs, jaxpr_as_fun(ClosedJaxpr(part, ()))(*known.values()), strict=True)
            tasks = [
                Task(
                    self.tasks[eqn.params["name"]],
                    tuple(_value(atom, known) for atom in eqn.invars),
                    sum(_cost(atom.aval) for atom in eqn.invars),
                )
                for eqn in marked
            ]
            for eqn, result in zip(marked, distribute(tasks, self.placement.mesh), strict=True):
                known |= zip(eqn.outvars, jax.tree.leaves(result), strict=True)
        return [_value(atom, known) for atom in jaxpr.outvars]


def _value(atom: Any, known: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, Literal) else known[atom]


def _cost(array: Any) -> float:
    """n^3 of a square matrix; of rows (R, P) what their smaller Gram matrix costs."""
    return float(array.size) * min(array.shape[-2:]) if array.ndim > 1 else 1.0


def _fill(array: Array, parts: int) -> Array:
    missing = -array.shape[-1] % parts
    if not missing:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)], mode="edge")
