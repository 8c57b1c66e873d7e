"""Checks of the arguments of `load`, before any work is done."""

from __future__ import annotations

import contextlib
import difflib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .catalogue import CATALOGUE, Entry
from .errors import DatasetError


def find_entry(name: object) -> Entry:
    """Find a data set by name.

    Args:
        name: What the caller gave.

    Returns:
        Its entry in the catalogue.

    Raises:
        DatasetError: There is none of this name; the nearest one is offered.
    """
    if isinstance(name, str) and name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(str(name).lower(), CATALOGUE, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise DatasetError(f"unknown data set {name!r}; {hint}known are {', '.join(CATALOGUE)}")


def check_integer(value: object, name: str, minimum: int) -> int:
    """Check an integer argument.

    Args:
        value: What the caller gave.
        name: What to call it in an error.
        minimum: Smallest value allowed.

    Returns:
        The integer.

    Raises:
        DatasetError: It is no integer or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise DatasetError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def is_sequence(value: object) -> bool:
    """Whether an argument is a sequence of entries, and no text."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def check_number(value: object, name: str) -> float:
    """Check an argument that is 0 or positive.

    Args:
        value: What the caller gave.
        name: What to call it in an error.

    Returns:
        The number.

    Raises:
        DatasetError: It is no number, negative, NaN or infinite.
    """
    number = math.nan
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of an integer longer than any float
            number = float(value)
    if not 0 <= number < math.inf:
        raise DatasetError(f"{name} must be 0 or positive and finite, got {value!r}")
    return number


def check_flag(value: object, name: str) -> bool:
    """Check an argument that is true or false.

    Raises:
        DatasetError: It is neither; a text such as "no" would count as true.
    """
    if not isinstance(value, bool | np.bool_):
        raise DatasetError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Check a floating-point type.

    Args:
        dtype: What the caller gave.

    Returns:
        The NumPy type.

    Raises:
        DatasetError: It is neither float32 nor float64.
    """
    message = f"dtype must be 'float32' or 'float64', got {dtype!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of names that NumPy gives up
            result = np.dtype(dtype)
    except (TypeError, ValueError, Warning) as error:
        raise DatasetError(message) from error
    # NumPy takes None for float64, also in comparisons.
    if dtype is None or result not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise DatasetError(message)
    return result


def check_classes(entry: Entry, classes: Sequence[int] | None) -> tuple[int, ...]:
    """Check a choice of classes.

    Args:
        entry: The data set.
        classes: Class ids, or None for all.

    Returns:
        The class ids, in the order given.

    Raises:
        DatasetError: Fewer than two, repeated or unknown classes, or not a sequence of integers.
    """
    if classes is None:
        return tuple(range(entry.num_classes))
    known = f"0...{entry.num_classes - 1}"
    if not is_sequence(classes):
        raise DatasetError(f"classes must be a sequence of class ids in {known}, got {classes!r}")
    chosen = tuple(check_integer(c, "every class", 0) for c in classes)
    if any(c >= entry.num_classes for c in chosen):
        raise DatasetError(f"classes of {entry.name} are {known}, got {chosen}")
    if len(set(chosen)) != len(chosen):
        raise DatasetError(f"classes must not repeat, got {chosen}")
    if len(chosen) < 2:
        raise DatasetError(f"at least two classes are needed, got {chosen}")
    return chosen
