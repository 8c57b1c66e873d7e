"""What a factorisation may be given: factors that fit together, and observed entries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.linear.descent import as_floating

Factors = tuple[Array, ...]


def check_factors(factors: Sequence[Any]) -> Factors:
    """Factors as floating matrices whose sizes follow each other.

    Raises:
      ValueError: none, not matrices, sizes that do not fit, NaN or infinity.
      TypeError: factors that are not floating.
    """
    if len(factors) == 0:
        raise ValueError("a factorisation needs at least one factor")
    checked = tuple(
        as_floating(w, f"factor {number}", (None, None), "(rows, columns)")
        for number, w in enumerate(factors, start=1)
    )
    for number, (a, b) in enumerate(pairwise(checked), start=1):
        if a.shape[1] != b.shape[0]:
            raise ValueError(
                f"factor {number} of shape {a.shape} does not multiply factor {number + 1} of "
                f"shape {b.shape}"
            )
    return checked


def check_start(factors: Sequence[Any], target: Array) -> Factors:
    """Factors that multiply to the shape and dtype of a target.

    Raises:
      ValueError, TypeError: as ``check_factors``; another shape or dtype than the target's.
    """
    checked = check_factors(factors)
    shape = (checked[0].shape[0], checked[-1].shape[1])
    if shape != target.shape:
        raise ValueError(f"the factors multiply to shape {shape}, but target has {target.shape}")
    dtypes = {array.dtype.name for array in (*checked, target)}
    if len(dtypes) > 1:
        raise TypeError(
            f"factors and target must have one dtype, got {' and '.join(sorted(dtypes))}"
        )
    return checked


def check_observations(target: Any, mask: Any) -> tuple[Array, Array]:
    """Target and mask (rows, columns), the mask in the dtype of the target.

    Unobserved entries of the target are not looked at and become 0.

    Raises:
      ValueError: shapes that differ, no observation, a mask other than 0 or 1, NaN or infinity at
        an observed entry.
      TypeError: a target that is not floating.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.shape != np.shape(target):
        raise ValueError(
            f"mask and target must be matrices of one shape, got {mask.shape} and "
            f"{np.shape(target)}"
        )
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("the mask must be boolean, or hold 0 and 1 only")
    if not mask.any():
        raise ValueError("the mask observes no entry; mark at least one with 1")
    target = jnp.where(mask != 0, jnp.asarray(target), 0)
    return as_floating(target, "target", mask.shape, str(mask.shape)), jnp.asarray(
        mask, target.dtype
    )
