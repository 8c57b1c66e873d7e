"""What is kept of the Kronecker factors of a layer: its means, their inverses, their use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from jax import Array

from natgrad_flax.linalg.dense import add_diagonal, inverse_psd, reciprocal, symmetric_product
from natgrad_flax.linalg.execution import by_columns, by_rows, product
from natgrad_flax.operators.kronecker import (
    AffineSignals,
    factor_rows,
    grouped,
    over_groups,
    ungrouped,
)
from natgrad_flax.operators.units import multiply_blocks
from natgrad_flax.signals.base import LayerUpdate, matrix_of
from natgrad_flax.signals.lookup import LookupSignals
from natgrad_flax.signals.shared import SharedSignals, Sharing
from natgrad_flax.signals.tied import TiedSignals, balance
from natgrad_flax.structures.averaged import update_like

Entry = dict[str, Array]

INPUTS = ("inputs", "shared", "rows", "counts")
"""What A is called in statistics."""


def factor_means(layer: AffineSignals, sharing: Sharing, name: str = "inputs") -> Entry:
    """A = sum a^T a / (N T) and B = sum D^T D / N for each group; means over samples.

    Returns:
      B as "units" (G, M/G, M/G), and A (G, K, K) under a name, or where it is a diagonal that,
      (1, K), as "counts". Of the second use of ``TiedSignals`` "tied_units" and "tied_inputs".
    """
    n = layer.num_samples
    if isinstance(layer, TiedSignals):
        own = factor_means(layer.direct, sharing, name)
        read, rows = layer.turned.rows(sharing)
        inputs = layer.turned.unit_squares()[None] if "counts" in own else products_of_rows(rows)
        over = float(n * num_positions(layer.turned, sharing))
        units = products_of_rows(read) / over
        return {**own, "tied_inputs": inputs / float(n), "tied_units": units}
    over = float(n * num_positions(layer, sharing))
    if layer.has_diagonal_inputs(sharing):
        layer = cast(LookupSignals, layer)
        units = products_of_rows(layer.unit_rows(sharing))
        return {"counts": layer.counts()[None] / over, "units": units / float(n)}
    left, right = factor_rows(layer, sharing)
    return {name: products_of_rows(left) / over, "units": products_of_rows(right) / float(n)}


def products_of_rows(rows: Array) -> Array:
    """rows^T rows of every group, (G, P, P) for rows (G, R, P)."""
    return jnp.stack([group.T @ group for group in rows])


def num_positions(layer: AffineSignals, sharing: Sharing) -> int:
    """How many rows of A a sample has in each group: T for "expand" of shared weights, else 1."""
    if isinstance(layer, SharedSignals) and sharing == "expand":
        return layer.num_positions
    return 1


def together(entry: Entry) -> Entry:
    """Statistics with one pair of factors for weights of two uses; others as they are."""
    if "tied_units" not in entry:
        return entry
    name = next(name for name in INPUTS if name in entry)
    left, right = (entry[name], entry["tied_inputs"]), (entry["units"], entry["tied_units"])
    over = [jnp.stack([_trace(factor) for factor in side]) for side in (left, right)]
    by_a, by_b = balance(*over)
    found = {name: by_a[0] * left[0] + by_a[1] * left[1]}
    found["units"] = by_b[0] * right[0] + by_b[1] * right[1]
    if "norms" in entry:
        traces = [jnp.sum(by * traces) for by, traces in zip((by_a, by_b), over, strict=True)]
        found["norms"] = entry["norms"] * jnp.stack(traces)
    return found


def inputs_of(entry: Entry) -> Array:
    """A of every group, its rows or its diagonal, from statistics."""
    return next(entry[name] for name in INPUTS if name in entry)


def _trace(factor: Array) -> Array:
    """Of (1, K, K), or of a diagonal (1, K)."""
    return jnp.sum(factor) if factor.ndim == 2 else jnp.trace(factor[0])


def mean_diagonal(factors: Array) -> Array:
    """Of all groups together."""
    return jnp.einsum("gkk->", factors) / float(factors.shape[0] * factors.shape[1])


def inverse_groups(factors: Array, rho: Array | float, *, shifted: bool) -> Array:
    """(A + rho)^{-1} for each of g groups, shape (g, K, K); the pseudo-inverse at the number 0."""

    def group(factor: Array, rho: Array | float) -> Array:
        return inverse_psd(add_diagonal(factor, rho), shifted=shifted)

    return over_groups(group, factors, rho)


def invert_inputs(entry: Entry, inputs: Array, rho: Array | float, *, shifted: bool) -> Entry:
    """(A + rho)^{-1} as ``FactorAverage.apply`` takes it.

    Args:
      entry: statistics of a layer, which say in what form A is there.
      inputs: A of every group, its rows or its diagonal, in that form.
      rho: what is added; the number 0 means the pseudo-inverse.
      shifted: whether something is added.
    """
    if "rows" in entry:
        return _invert_rows(inputs, rho, shifted)
    if "counts" in entry:
        return {"quotients": reciprocal(inputs + rho)[..., None]}
    return {"inputs": inverse_groups(inputs, rho, shifted=shifted)}


def _invert_rows(rows: Array, rho: Array | float, shifted: bool) -> Entry:
    """(r^T r + rho)^{-1} = outside - r^T core r for rows r (R, P); the pseudo-inverse at 0."""
    gram = inverse_psd(add_diagonal(by_rows(symmetric_product(rows)), rho), shifted=shifted)
    if not shifted:
        return {"rows": rows, "core": -gram @ gram, "outside": jnp.zeros((), rows.dtype)}
    return {"rows": rows, "core": gram / rho, "outside": jnp.asarray(1 / rho, rows.dtype)}


def apply_entries(
    inverse: tuple[dict[str, Any], ...],
    gradient: tuple[LayerUpdate, ...],
    solve: Callable[[dict[str, Any], Array], Array],
) -> tuple[LayerUpdate, ...]:
    """G^{-1} g by inverses of blocks of units or, of an affine layer, by a function.

    Args:
      inverse: of ``AveragedStructure.invert``.
      gradient: g.
      solve: from an entry of the inverse and g (fan_in, M) to the update of this shape.
    """
    return tuple(
        update_like(
            g,
            multiply_blocks(entry["blocks"], matrix_of(g))
            if "blocks" in entry
            else solve(entry, matrix_of(g)),
        )
        for entry, g in zip(inverse, gradient, strict=True)
    )


def solve_affine(entry: Entry, matrix: Array) -> Array:
    """A^{-1} G B^{-1}; a factor that is not there is the identity."""
    groups = next((len(entry[name]) for name in ("units", "inputs") if name in entry), 1)
    half = grouped(matrix, groups)
    if "rows" in entry:
        half = entry["outside"] * half - by_columns(
            lambda parts, rows, core: rows.T @ (core @ (rows @ parts)),
            (half,),
            (entry["rows"], entry["core"]),
        )
    elif "quotients" in entry:
        half = entry["quotients"] * half
    elif "inputs" in entry:
        half = product(entry["inputs"], half)
    return ungrouped(product(half, entry["units"]) if "units" in entry else half)
