"""What layers and models are given, checked: sizes, variances, words and images."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from jax import Array

from natgrad_flax.arguments.scalars import as_integer, as_number

PADDINGS = ("SAME", "VALID", "CIRCULAR")
"""How a convolution treats the border: zeros, no positions beyond it, or periodic."""


def _is_size(value: object) -> bool:
    return (as_integer(value) or 0) > 0


def check_sizes(**sizes: object) -> None:
    """Raises ValueError unless all are positive integers."""
    for name, value in sizes.items():
        if not _is_size(value):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def size_tuple(
    name: str, values: object, what: str, minimum: int = 1, maximum: int | None = None
) -> tuple[int, ...]:
    """A tuple of positive integers.

    Args:
      name: the argument.
      values: what was given for it.
      what: what it must be, for the message.
      minimum: how many entries it must have.
      maximum: how many it may have, where not None.

    Raises:
      ValueError: it is anything else.
    """
    if (
        not isinstance(values, Sequence)
        or len(values) < minimum
        or (maximum is not None and len(values) > maximum)
        or not all(_is_size(value) for value in values)
    ):
        raise ValueError(f"{name} must be {what}, got {values!r}")
    return tuple(map(int, values))


def size_each(name: str, value: object, count: int, each: str) -> tuple[int, ...]:
    """A tuple of positive integers, where one number stands for all entries.

    Args:
      name: the argument.
      value: one number, or one each.
      count: the number of entries.
      each: what has an entry, for the message: "spatial dimension", "layer".

    Raises:
      ValueError: not positive integers, or another number of them.
    """
    values = value if isinstance(value, Sequence) else (value,) * count
    what = f"a positive integer or {count} of them, one a {each}"
    return size_tuple(name, values, what, count, count)


def check_variances(weight_variance: object, bias_variance: object) -> None:
    """Raises ValueError unless sigma_w^2 is positive and sigma_b^2 positive or 0."""
    if not 0 < _or_nan(weight_variance) < math.inf:
        raise ValueError(f"weight_variance must be positive and finite, got {weight_variance!r}")
    if not 0 <= _or_nan(bias_variance) < math.inf:
        raise ValueError(f"bias_variance must be 0 or positive and finite, got {bias_variance!r}")


def _or_nan(value: object) -> float:
    found = as_number(value)
    return math.nan if found is None else found


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raises ValueError on a word that is not known, with the nearest one."""
    if value not in known:
        near = difflib.get_close_matches(str(value).casefold(), map(str.casefold, known), n=1)
        hints = [word for word in known if near and word.casefold() == near[0]]
        hint = f" Did you mean {hints[0]!r}?" if hints else ""
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}.{hint}")


def image_shape(input_shape: object) -> tuple[int, int, int]:
    """The shape (H, W, C) of an image, given as ``input_shape``.

    Raises:
      ValueError: it is anything but three positive integers.
    """
    what = "three positive integers, (H, W, C)"
    height, width, channels = size_tuple("input_shape", input_shape, what, 3, 3)
    return height, width, channels


def check_images(x: Array, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless x has shape (N, *shape)."""
    if x.ndim != 4 or x.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"the model takes images of shape (N, {wanted}), got x of {x.shape}")
