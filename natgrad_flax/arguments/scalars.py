"""Settings that are single numbers, of Python, NumPy or JAX: one check for all entries."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MAX_STEPS = 10**7
"""Steps that a loop takes one by one, at most: more would take hours."""


def as_number(value: Any) -> int | float | None:
    """The Python number that is a concrete real scalar of Python, NumPy or JAX; None else.

    Truth values, complex numbers, text, traced values and arrays with axes are no numbers here.
    """
    if isinstance(value, (int, float)):
        return None if isinstance(value, bool) else value
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (np.generic, np.ndarray, Array)):
        return None
    if value.ndim or not is_real(value):
        return None
    found: int | float = np.asarray(value).item()
    return found


def as_integer(value: object) -> int | None:
    """The Python integer that is a concrete integer of Python, NumPy or JAX; None else."""
    found = as_number(value)
    return found if isinstance(found, int) else None


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """The Python integer that an integer of Python, NumPy or JAX is.

    Raises:
      ValueError: not a concrete integer, or one that is out of range.
    """
    found = as_integer(value)
    if found is None or found < minimum or (maximum is not None and found > maximum):
        wanted = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise ValueError(f"{name} must be an integer of {wanted}, got {shown(value)}")
    return found


def check_seed(seed: object, name: str = "seed", draws: int = 1) -> int:
    """The seed of random keys, which as many after it as are drawn must follow below 2^32.

    JAX takes larger ones modulo 2^32 where 64-bit mode is off, so that they would be other seeds.

    Raises:
      ValueError: not an integer, negative, or too large.
    """
    return check_integer(name, seed, 0, 2**32 - draws)


def check_steps(steps: object, name: str = "steps", minimum: int = 0) -> int:
    """A number of steps to be taken one by one.

    Raises:
      ValueError: not an integer, too small, or more than ``MAX_STEPS``.
    """
    found = check_integer(name, steps, minimum)
    if found > MAX_STEPS:
        raise ValueError(
            f"{name} must be at most {MAX_STEPS:,}, got {found:,}: they are taken one by one"
        )
    return found


def check_number(name: str, value: object, *, positive: bool) -> float:
    """The Python number that a real number of Python, NumPy or JAX is.

    Raises:
      ValueError: not a concrete real scalar, not finite, negative, or 0 where it must be positive.
    """
    found = as_number(value)
    if found is None:
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    if not math.isfinite(found) or found < 0 or (positive and found == 0):
        wanted = "positive" if positive else "0 or positive"
        raise ValueError(f"{name} must be {wanted} and finite, got {shown(value)}")
    return found


def check_learning_rate(learning_rate: Any, *, schedule: bool = False) -> Any:
    """A learning rate as a Python number; what only a program knows stays as it is.

    Args:
      learning_rate: the learning rate.
      schedule: whether a function of the step and a traced number will do, too.

    Raises:
      ValueError: not a real number, not positive or not finite.
    """
    if schedule and (callable(learning_rate) or is_traced_number(learning_rate)):
        return learning_rate
    return check_number("learning_rate", learning_rate, positive=True)


def as_values(name: str, values: Any) -> np.ndarray:
    """A sequence of real numbers as float64, shape (T,).

    Raises:
      ValueError: anything else, or nothing in it.
    """
    try:
        found = np.asarray(values)
    except (TypeError, ValueError):
        found = np.empty(())
    if found.ndim != 1 or not found.size or not is_real(found):
        raise ValueError(f"{name} must be a sequence of numbers, got {shown(values)}")
    return found.astype(np.float64)


def keep_plain(settings: Any) -> None:
    """Makes Python numbers of the numbers of a frozen dataclass, also in tuples.

    So they can be written, compared and hashed, whichever library they came from.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(map(plain, value))
        number = as_number(value)
        return value if number is None else number

    for field in dataclasses.fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))


def at_step(schedule: Any, steps: Array, name: str) -> Any:
    """The value of a setting at a step.

    Args:
      schedule: a function of the step, or the value.
      steps: taken so far.
      name: of the setting, for the message.

    Raises:
      ValueError: the schedule gives anything but one real number.
    """
    if not callable(schedule):
        return schedule
    value = schedule(steps)
    if as_number(value) is None and not is_traced_number(value):
        raise ValueError(
            f"the schedule of {name} must give one number for a step, got {shown(value)}"
        )
    return value


def is_traced_number(value: object) -> bool:
    """Whether a real scalar that is not known before its program runs."""
    return isinstance(value, jax.core.Tracer) and value.ndim == 0 and is_real(value)


def is_real(array: Any) -> bool:
    """Whether an array holds real numbers."""
    return bool(
        jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    )


def shown(value: object) -> str:
    """What was given, for a message: of what is traced or large its type and shape alone."""
    if isinstance(value, jax.core.Tracer):
        return (
            f"a traced {value.dtype} of shape {value.shape} (around this function, "
            "optax.inject_hyperparams takes it by static_args)"
        )
    if isinstance(value, (np.ndarray, Array)) and value.ndim:
        return f"an array of {value.dtype} and shape {value.shape}"
    return repr(value)
