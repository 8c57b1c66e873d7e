"""Long descents inside one compiled loop, and the checks that the linear models share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import as_array, check_finite
from natgrad_flax.arguments.memory import available_memory
from natgrad_flax.arguments.scalars import check_integer, check_number, check_steps

Integrator = Literal["euler", "rk4"]


class Descent(NamedTuple):
    """The parameters at the end of ``descend``, and at the steps that it recorded.

    Attributes:
      final: parameters after the last step.
      recorded: parameters at the recorded steps, with a leading axis of that length.
      steps: the recorded steps, from 0 to the last one.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import linear
      >>> x, y = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
      >>> field = linear.logistic.gradient_field(x, y)
      >>> found = linear.descend(
      ...     field, jnp.zeros(2), step_size=0.1, steps=20, record_every=10
      ... )
      >>> found.final.shape, found.recorded.shape, found.steps.tolist()
      ((2,), (3, 2), [0, 10, 20])
    """

    final: Any
    recorded: Any
    steps: np.ndarray


def descend(
    field: Callable[[Any], Any],
    start: Any,
    *,
    step_size: float,
    steps: int,
    record_every: int | None = None,
    integrator: Integrator = "euler",
) -> Descent:
    """Follows parameters' = -field(parameters) for ``steps`` steps of ``step_size``.

    The whole run is one ``lax.scan``: it compiles once for each kind and shape of field.

    Args:
      field: a gradient or natural-gradient field of this package; a function of one's own is
        wrapped as ``jax.tree_util.Partial(function)``.
      start: parameters, in the form that the field takes.
      step_size: eta; with "rk4", the time of a step.
      steps: number of steps.
      record_every: keep the parameters each so many steps, and at the start; it divides ``steps``.
        None keeps the start and the end.
      integrator: "euler" is the descent itself; "rk4" follows the flow, with four fields a step.

    Returns:
      Final and recorded parameters.

    Raises:
      ValueError: a setting is out of range, or the record would not fit into memory.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import linear
      >>> x, y = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
      >>> field = linear.logistic.natural_gradient_field(x, y)
      >>> found = linear.descend(
      ...     field, jnp.zeros(2), step_size=0.1, steps=20, integrator="rk4"
      ... )
      >>> # of the flow at time 2
      >>> margins = linear.logistic.train_margins(jnp.zeros(2), 2.0)
      >>> bool(jnp.allclose(y * (x @ found.final), margins, rtol=1e-4))
      True
    """
    steps = check_steps(steps, minimum=1)
    record_every = check_integer("record_every", steps if record_every is None else record_every, 1)
    if steps % record_every:
        raise ValueError(f"record_every={record_every} must divide steps={steps}")
    step_size = check_number("step_size", step_size, positive=True)
    if integrator not in get_args(Integrator):
        raise ValueError(f'integrator must be "euler" or "rk4", got {integrator!r}')
    start = jax.tree.map(jnp.asarray, start)
    leaves = jax.tree.leaves(start)
    check_memory(
        (steps // record_every + 1, sum(leaf.size for leaf in leaves)),
        leaves[0].dtype,
        "the record of the descent",
        "record fewer steps",
    )
    final, later = _scan(field, start, step_size, steps // record_every, record_every, integrator)
    recorded = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, later)
    return Descent(final, recorded, np.arange(0, steps + 1, record_every))


@partial(jax.jit, static_argnames=("records", "record_every", "integrator"))
def _scan(
    field: Callable[[Any], Any],
    start: Any,
    step_size: Array | float,
    records: int,
    record_every: int,
    integrator: Integrator,
) -> tuple[Any, Any]:
    def move(parameters: Any, direction: Any, time: Any) -> Any:
        return jax.tree.map(lambda p, d: p - jnp.asarray(time, p.dtype) * d, parameters, direction)

    def euler(_: Any, parameters: Any) -> Any:
        return move(parameters, field(parameters), step_size)

    def rk4(_: Any, parameters: Any) -> Any:
        k1 = field(parameters)
        k2 = field(move(parameters, k1, step_size / 2))
        k3 = field(move(parameters, k2, step_size / 2))
        k4 = field(move(parameters, k3, step_size))
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return move(parameters, mean, step_size)

    step = euler if integrator == "euler" else rk4

    def record(parameters: Any, _: None) -> tuple[Any, Any]:
        parameters = jax.lax.fori_loop(0, record_every, step, parameters)
        return parameters, parameters

    return jax.lax.scan(record, start, length=records)


def check_memory(shape: tuple[int, ...], dtype: Any, what: str, advice: str) -> None:
    """Refuses an array that cannot fit, from its shape alone.

    Args:
      shape: of the largest array, counted twice for the factorisation or copy that goes with it.
      dtype: of its entries.
      what: the array, for the message.
      advice: what to do instead.

    Raises:
      ValueError: the device has less memory than that.
    """
    needed = 2 * np.dtype(dtype).itemsize * float(np.prod(shape, dtype=float))
    free = available_memory()
    if needed > free:
        raise ValueError(
            f"{what} ({' x '.join(map(str, shape))}) needs {needed / 2**30:,.1f} GiB and the "
            f"device has {free / 2**30:,.1f} GiB; {advice}"
        )


def as_floating(array: Any, name: str, shape: tuple[int | None, ...], meaning: str) -> Array:
    """An array of real floating numbers without NaN or infinity.

    Args:
      array: what the caller gave.
      name: what to call it in an error.
      shape: the shape wanted; None leaves an axis free.
      meaning: the shape in words, such as "(N, D)".

    Raises:
      ValueError: another shape, an empty axis, NaN or infinity.
      TypeError: not a floating array.
    """
    array = as_array(array, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array, got dtype {array.dtype}")
    fits = array.ndim == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits or 0 in array.shape:
        raise ValueError(f"{name} must have shape {meaning}, got {array.shape}")
    check_finite(array, name)
    return array
